"""``python -m taskray``"""

import sys

from taskray.cli import main

sys.exit(main())
