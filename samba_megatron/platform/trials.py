"""Tries things out in a process of its own, so that what crashes or hangs costs only itself.

A compiled package built for another torch may end the process that imports it, a kernel may poison
its CUDA context or never return. The child runs one trial after another and says when each begins
and what came of it; when it is silent for too long, or gone, that trial is the culprit, and another
child goes on after it.
"""

import dataclasses
import json
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import IO

from samba_megatron.platform.findings import Finding, State, first_line

Trial = tuple[str, str, Callable[[], Finding]]
"""Area, name, and what to do."""

START = ("kernels", "their process")
"""Area and name of what is to blame where no trial has begun."""
_ROOT = Path(__file__).resolve().parents[2]
_STDERR = 2
_START_ANOTHER = 3
"""The child's exit code where a CUDA error may have spoilt it for the trials that follow."""


def serve(trials: Sequence[Trial], done: int) -> None:
    """The child's part: runs the trials after the first ``done`` and reports on standard output.

    Whatever else the libraries print goes to standard error.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(_STDERR, 1)
    for area, name, run in trials[done:]:
        _send(channel, {"begin": [area, name]})
        try:
            finding = run()
        except Exception as error:
            finding = Finding(area, name, State.BROKEN, first_line(error))
        _send(channel, {"end": dataclasses.asdict(finding)})
        if "CUDA error" in finding.found:
            sys.exit(_START_ANOTHER)


def _send(channel: IO[str], message: dict[str, object]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()


def run_in_children(
    module: str, seconds: float, arguments: Sequence[str] = (), stop: float = math.inf
) -> Generator[Finding]:
    """The findings of ``python -m module``, whose main calls :func:`serve`, as they come.

    Args:
        module: it takes the number of trials to leave out as its argument.
        seconds: what a trial may take.
        arguments: further ones.
        stop: moment (of the monotonic clock) at which a trial that goes on is ended.
    """
    done = 0
    while True:
        child = _Child([module, str(done), *arguments], seconds, stop)
        try:
            for finding in child.findings():
                done += 1
                yield finding
            ending = child.wait()
        finally:
            child.end()
        if ending is Ending.COMPLETE:
            return
        if isinstance(ending, Finding):
            done += 1
            yield ending
            if not child.has_begun:
                return


class Ending(Enum):
    """How a child ended of which no trial is to blame."""

    COMPLETE = "all trials are done"
    SPOILT = "the rest needs another process"


class _Child:
    """One process, from its start to the trial that it did not survive."""

    def __init__(self, words: Sequence[str], seconds: float, stop: float) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        self._seconds, self._stop, self._hung = seconds, stop, False
        self._began = time.monotonic()
        self._pending: tuple[str, str] | None = START
        self.has_begun = False

    def findings(self) -> Iterator[Finding]:
        """What the child reports, until it is done, gone or silent."""
        for line in self._lines():
            message = json.loads(line)
            if "begin" in message:
                area, name = message["begin"]
                self._pending, self.has_begun = (area, name), True
                continue
            self._pending = None
            values = message["end"]
            yield Finding(**{**values, "state": State(values["state"])})

    def _lines(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        pipe, buffer = self._process.stdout.fileno(), b""
        deadline = self._deadline()
        while True:
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._hung = True
                return
            received = os.read(pipe, 65536)
            if not received:
                return
            *lines, buffer = (buffer + received).split(b"\n")
            yield from lines
            deadline = self._deadline()

    def _deadline(self) -> float:
        self._began = time.monotonic()
        return min(self._began + self._seconds, self._stop)

    def wait(self) -> Finding | Ending:
        """How it ended; a finding where a trial is to blame."""
        code = None if self._hung else self._process.wait()
        if self._pending is None:
            return Ending.SPOILT if code == _START_ANOTHER else Ending.COMPLETE
        if code is None:
            reason = f"no answer within {time.monotonic() - self._began:.0f} s"
        else:
            reason = f"its process ended with {_ending(code)}{self._last_words()}"
        return Finding(*self._pending, State.BROKEN, reason)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""

    def end(self) -> None:
        """Nothing of it stays behind."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()


def _ending(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
