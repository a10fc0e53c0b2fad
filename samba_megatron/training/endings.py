"""What the run's ledger (``run.jsonl``) hears from the training processes: starts, failures, ends.

Rank 0 writes the start and every orderly end. A rank that fails writes at once, itself, what failed
and that the run has ended: its peers learn of it only by broken connections, and are killed before
they could say anything true. Whoever comes second finds an end of the same job and adds nothing.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from samba_megatron.checkpoint import folder
from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.hardware import node_name
from samba_megatron.tracking import ledger
from samba_megatron.tracking.ledger import Cause

_OF_CODE = {
    ExitCode.DONE: Cause.DONE,
    ExitCode.HOLD: Cause.NON_FINITE,
    ExitCode.BAD_NODE: Cause.BAD_NODE,
    ExitCode.HANG: Cause.HANG,
}
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
_INTERRUPTED = 130
_FOR_RANK_0_SECONDS = 1.0


class RunLog:
    """One process's pen for the ledger of a run.

    Args:
        run_dir: the run's folder.
        checkpoints: the folder that ``checkpoint.save`` names.
    """

    def __init__(self, run_dir: Path, checkpoints: Path) -> None:
        self.run_dir, self._checkpoints = run_dir, checkpoints
        self._since = time.time()
        self._rank = int(os.environ.get("RANK", "0"))
        self.step = 0
        """Steps done, for whatever is written next."""

    def start(self, nodes: list[str], **values: Any) -> None:
        """The run begins its first step, or goes on; written by rank 0.

        Args:
            nodes: the node of each rank, by rank.
            values: what else there is to say.
        """
        names = list(dict.fromkeys(nodes))
        self.note("start", world_size=len(nodes), host=node_name(), nodes=names, **values)

    def note(self, event: str, **values: Any) -> None:
        """An event at the current step, by rank 0."""
        if self._rank == 0:
            ledger.append(self.run_dir, event, step=self.step, **values)

    def hang(self, seen: str, sentences: list[str], culprits: dict[int, str], report: Path) -> None:
        """Nothing moves; written by whichever rank makes the report.

        Args:
            seen: what the watchdog saw.
            sentences: what is known about it.
            culprits: the nodes of the ranks to blame, by rank.
            report: the file for people.
        """
        blamed = [{"rank": rank, "host": host} for rank, host in culprits.items()]
        values = {"seen": seen, "sentences": sentences[:20], "culprits": blamed}
        ledger.append(self.run_dir, "hang", step=self.step, report=str(report), **values)

    def end(self, code: int, cause: Cause | None, reason: str, bad_node: str | None = None) -> None:
        """The job ends; nothing is added where this job's end is in the ledger already.

        Args:
            code: the exit code.
            cause: why; None where the code or what the scheduler knows must tell.
            reason: one sentence for people.
            bad_node: the one to exclude from the next start, where it is known.
        """
        if self._has_ended():
            return
        ledger.append(
            self.run_dir,
            "end",
            code=int(code),
            cause=cause or _OF_CODE.get(ExitCode(code)),
            reason=reason,
            step=self.step,
            checkpoint_step=self._checkpoint_step(),
            **({"bad_node": bad_node} if bad_node else {}),
        )

    def failure(self, error: BaseException) -> None:
        """An exception ends this rank, and with it the run.

        A mistake in the input is found by every rank as a rule: then rank 0 writes it.
        """
        shared = isinstance(error, UserError | ExitWith) and not getattr(
            error, "rank_specific", False
        )
        if shared and self._rank != 0:
            time.sleep(_FOR_RANK_0_SECONDS)
        if self._has_ended():
            return
        code, cause = _judge(error)
        ledger.append(
            self.run_dir,
            "failure",
            rank=self._rank,
            host=node_name(),
            type=type(error).__name__,
            message=_first_line(error),
            where=_last_place(error),
            step=self.step,
        )
        self.end(code, cause, _sentence(error), getattr(error, "bad_node", None))

    @contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Inside, an exception that gets out is written down on its way."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, SystemExit):
                self._try_to_record(error)
            raise

    def _try_to_record(self, error: BaseException) -> None:
        """A ledger that cannot be written must not hide what went wrong."""
        try:
            self.failure(error)
        except OSError as trouble:
            print(f"{self.run_dir / ledger.FILE_NAME}: {trouble}", file=sys.stderr, flush=True)

    def _has_ended(self) -> bool:
        ends = ledger.read(self.run_dir, "end")
        return bool(ends) and ends[-1]["time"] >= self._since

    def _checkpoint_step(self) -> int | None:
        name = folder.read_latest(self._checkpoints)
        return folder.checkpoint_step(name) if name else None


def _judge(error: BaseException) -> tuple[int, Cause | None]:
    """The exit code that the exception will end the process with, and its cause."""
    if isinstance(error, UserError):
        return ExitCode.USER_ERROR, Cause.USER_ERROR
    if isinstance(error, ExitWith):
        return error.code, Cause(error.cause) if error.cause else None
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED, Cause.USER_STOP
    if is_out_of_memory(error):
        return ExitCode.FAILED, Cause.OUT_OF_MEMORY
    return ExitCode.FAILED, Cause.BUG


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had too little memory (torch says it in several ways)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError | ExitWith):
        return str(error)
    place = _last_place(error)
    text = f"{type(error).__name__}: {_first_line(error)}".removesuffix(": ")
    rank = os.environ.get("RANK", "0")
    return f"rank {rank} on {node_name()}: {text}" + (f" ({place})" if place else "")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:500]


def _last_place(error: BaseException) -> str:
    """``file:line in function``, where the exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
