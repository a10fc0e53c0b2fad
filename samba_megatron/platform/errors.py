"""The two kinds of failure: the user's mistakes (one sentence) and ours (a traceback)."""

import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from samba_megatron.platform.exits import ExitCode


class UserError(Exception):
    """A mistake in the user's input; the message is one sentence naming the thing and the remedy.

    Every rank of a run finds the same mistake, so rank 0 alone says it, unless it is
    ``rank_specific``.
    """

    def __init__(self, message: str, rank_specific: bool = False) -> None:
        super().__init__(message)
        self.rank_specific = rank_specific


class ExitWith(Exception):
    """Ends a command with ``code`` after an orderly stop; ``reason`` is printed.

    ``cause`` is one of the ledger's causes where the code alone does not tell it, ``bad_node`` the
    node to start without.
    """

    def __init__(
        self, code: ExitCode, reason: str, cause: str = "", bad_node: str | None = None
    ) -> None:
        super().__init__(reason)
        self.bad_node = bad_node
        self.code = code
        self.reason = reason
        self.cause = cause


def run_command(main: Callable[[], object]) -> NoReturn:
    """Runs a command's ``main`` and ends the process with the exit code that its outcome means.

    A :class:`UserError` becomes ``error: <sentence>`` on stderr and exit code 2, an
    :class:`ExitWith` its own code; an integer result is the exit code; any other exception is a
    bug and keeps its traceback.
    """
    try:
        result = main()
    except UserError as error:
        _say_once(f"error: {error}", error.rank_specific)
        sys.exit(ExitCode.USER_ERROR)
    except ExitWith as stop:
        _say_once(stop.reason, everywhere=False)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(result if isinstance(result, int) else ExitCode.DONE)


def _say_once(sentence: str, everywhere: bool) -> None:
    """Prints on rank 0; the others leave later: a launcher ends all when the first is gone."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or everywhere:
        print(sentence, file=sys.stderr, flush=True)
    if rank != "0":
        time.sleep(1.0)
