"""One file per `taskray` command: its one line of help, its arguments, and what it calls.

A command imports what it needs when it runs, so that ``taskray --help`` and errors in a job file
need neither torch nor Ray.
"""
