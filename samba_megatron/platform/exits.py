"""The exit codes of every command, defined once, so that a scheduler can act on the cause.

Slurm reports the exit code of the rank that failed first as the job's own, and a site's
``RequeueExit``/``RequeueExitHold`` settings can act on it: the code is part of the interface.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """Why a command ended."""

    DONE = 0
    """The work is finished: all steps or tokens are done."""
    FAILED = 1
    """An unexpected error (a bug, a broken library): there is a traceback."""
    USER_ERROR = 2
    """The input was wrong: one sentence on stderr names the thing and the remedy."""
    REQUEUE = 75
    """Stopped early by a signal or a time limit, state saved: start the same command again."""
    HOLD = 76
    """A person must look before it runs again (non-finite loss, corrupt checkpoint)."""
    BAD_NODE = 77
    """This node's hardware gave a wrong or unrepeatable answer: exclude it, then run again."""
    HANG = 78
    """No step was finished in time: a report names the rank that others waited for. Start again."""
