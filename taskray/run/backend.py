"""Where a run happens: on Ray, or in this process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from taskray.job.config import Job
from taskray.run.recorder import Recorder


def ray_session(address: str | None, inline: bool) -> AbstractContextManager[Any]:
    """Ray for the time of a ``with`` block; nothing where the run is inline.

    ``address`` is that of a running cluster; None starts Ray on this machine.
    """
    if inline:
        return nullcontext()
    from taskray.runtime.session import session  # imports Ray

    return session(address)


def make_collective(job: Job, checkpoints: str, recorder: Recorder, inline: bool) -> Any:
    """The tasks of the job as Ray actors, or all of them in this process."""
    if inline:
        from taskray.runtime.inline import InlineCollective

        return InlineCollective(job, checkpoints, recorder)
    from taskray.runtime.collective import Collective  # imports Ray

    return Collective(job, checkpoints, recorder)
