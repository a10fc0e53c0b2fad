"""Ends a run in which nothing moves any more, and says who keeps it from moving.

A thread of each rank looks every few seconds whether its loop has got on. Where it has not for too
long, the rank writes what it knows into the run folder (``hang/<start of the job>/``); the lowest
rank that can makes one report of all records, and then every rank ends with the code for a hang, at
once: the main thread may be inside a collective that never returns. Nothing is saved.

Ranks notice by themselves, at about the same time, since they wait for one another in every step;
a rank that moves slowly, or is stuck in a longer phase, hears of it through the folder.
"""

import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from samba_megatron.config import RunConfig
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.files import write_text
from samba_megatron.tracking.ledger import Cause
from samba_megatron.training import culprit, evidence
from samba_megatron.training.endings import RunLog

Kind = Literal["first step", "step", "validation", "save"]

REPORT = "report.txt"
_LEAST_SECONDS = 300.0
_MEDIANS = 10.0
_LONGEST_TIMES = 5.0
_LONG_PHASE_SECONDS = 1800.0
_FIRST_STEP = 5.0
_SHARE_OF_TIMEOUT = 0.9
"""torch ends a run whose collective exceeds its own timeout: the report must be written before."""
_TIMEOUTS = ("Timed out waiting", "operation timeout", "wait timeout")
"""What gloo, NCCL and the store say when they give up."""


class Limits:
    """How long a phase may last, learned from those before where no limit is set.

    Args:
        minutes: the limit that the configuration sets, if any.
        timeout_minutes: torch's own, for a single collective.
    """

    def __init__(self, minutes: float | None, timeout_minutes: float) -> None:
        self._set = minutes * 60 if minutes is not None else None
        self._timeout = timeout_minutes * 60
        self._steps: deque[float] = deque(maxlen=100)
        self._longest: dict[Kind, float] = {}

    def learn(self, kind: Kind, seconds: float) -> None:
        """A phase has ended."""
        if kind == "step":
            self._steps.append(seconds)
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds)

    def seconds(self, kind: Kind) -> float:
        """The limit of a phase that is going on."""
        if kind in ("validation", "save"):
            learned = max(_LONG_PHASE_SECONDS, _LONGEST_TIMES * self._longest.get(kind, 0.0))
            return self._set or learned
        limit = self._set or self._for_steps()
        return _FIRST_STEP * limit if kind == "first step" else limit

    def _for_steps(self) -> float:
        steps = list(self._steps)
        usual = _MEDIANS * statistics.median(steps) if steps else 0.0
        before_torch = _SHARE_OF_TIMEOUT * self._timeout
        # Steps longer than torch's timeout were possible: they are many collectives.
        return max(min(max(_LEAST_SECONDS, usual), before_torch), 3 * max(steps, default=0.0))


class Watchdog:
    """Watches over one rank's loop.

    Args:
        log: the run's ledger.
        config: of the run.
        rank: this process's.
    """

    def __init__(self, log: RunLog, config: RunConfig, rank: int) -> None:
        self._log, self._rank, self._wanted = log, rank, config.faults.watchdog
        timeout = config.parallel.distributed_timeout_minutes
        self.limits = Limits(config.faults.hang_timeout_minutes, timeout)
        self._nodes: list[str] = []
        self._folder = Path()
        self._kind: Kind = "first step"
        self._name = "the start"
        self._step_began: float | None = None
        self._moves = 0
        self._stop = threading.Event()
        self._firing = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, nodes: list[str], stamp: str) -> None:
        """The loop begins.

        Args:
            nodes: each rank's node.
            stamp: a name for this start of the run, the same on every rank.
        """
        self._nodes, self._folder = nodes, self._log.run_dir / "hang" / stamp
        if self._wanted:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def step(self, step: int) -> None:
        """The loop begins a step: whatever was before it has ended."""
        now = time.monotonic()
        if self._step_began is not None and self._kind == "step":
            self.limits.learn("step", now - self._step_began)
        self._kind = "first step" if self._name == "the start" else "step"
        self._name, self._step_began = f"step {step}", now
        self._moves += 1

    @contextmanager
    def phase(self, kind: Kind) -> Iterator[None]:
        """Inside, the loop does something that may last longer than a step."""
        began, around = time.monotonic(), (self._kind, self._name)
        self._kind, self._name, self._step_began = kind, f"{kind} after {self._name}", None
        self._moves += 1
        yield
        self.limits.learn(kind, time.monotonic() - began)
        self._kind, self._name = around
        self._moves += 1

    def stop(self) -> None:
        """The loop has ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def judge(self, error: BaseException) -> None:
        """An exception left the loop: does not return where it is only what a hang looks like from
        here, a collective that torch gave up or whose peers have ended because of the hang."""
        if self._thread is None:
            return
        gave_up = isinstance(error, RuntimeError) and any(w in str(error) for w in _TIMEOUTS)
        if gave_up or self._folder.exists() or self._firing.locked():
            first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._fire(f"{self._name} was given up: {first_line}")

    def _watch(self) -> None:
        moves, idle, last = self._moves, 0.0, time.monotonic()
        while not self._stop.wait(self._pause()):
            now = time.monotonic()
            # A job that the scheduler has suspended was not slow: its pause does not count.
            gap, last = min(now - last, 2 * self._pause()), now
            idle = idle + gap if moves == self._moves else 0.0
            moves = self._moves
            limit, still = self.limits.seconds(self._kind), f"no progress for {idle:.0f} s"
            if idle > limit:
                self._fire(f"{self._name}: {still}, the limit is {limit:.0f} s")
            elif idle > min(60.0, limit / 2) and self._folder.exists():
                self._fire(f"{self._name}: {still}, and other ranks have given up")

    def _pause(self) -> float:
        return min(5.0, self.limits.seconds(self._kind) / 10)

    def _fire(self, headline: str) -> None:
        """Writes this rank's record, sees to the report, and ends the process."""
        if not self._firing.acquire(blocking=False):
            time.sleep(3600)  # the other thread ends the process
        try:
            self._write_record(headline)
            if not self._is_reported_by_others():
                self._report(headline)
        except Exception:  # the process must end whatever stands in the way of a report
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(ExitCode.HANG)

    def _write_record(self, headline: str) -> None:
        progress = {"phase": self._name, "step": self._log.step, "headline": headline}
        self._folder.mkdir(parents=True, exist_ok=True)
        record = json.dumps(evidence.collect(self._rank, progress))
        write_text(self._folder / f"rank_{self._rank:05d}.json", record)

    def _is_reported_by_others(self) -> bool:
        """Waits until the report is there, or it is this rank's turn to make it: the first rank's
        when all records are there or time is up, later any other's."""
        grace = min(15.0, max(3.0, self.limits.seconds("step") / 4))
        deadline = time.monotonic() + grace * (1 if self._rank == 0 else 2)
        while time.monotonic() < deadline:
            if (self._folder / REPORT).exists():
                return True
            if self._rank == 0 and len(self._records()) == len(self._nodes):
                break
            time.sleep(0.5)
        try:
            (self._folder / "reporter").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(grace)
            return True
        return False

    def _records(self) -> list[Path]:
        return list(self._folder.glob("rank_*.json"))

    def _report(self, headline: str) -> None:
        records = {}
        for path in self._records():
            with suppress(ValueError, OSError):
                record = json.loads(path.read_text())
                records[int(record["rank"])] = record
        verdict = culprit.find_culprits(records, self._nodes)
        text = culprit.report(records, self._nodes, verdict, headline)
        write_text(self._folder / REPORT, text)
        culprits = {rank: self._nodes[rank] for rank in verdict.culprits}
        self._log.hang(headline, verdict.sentences, culprits, self._folder / REPORT)
        self._log.end(ExitCode.HANG, Cause.HANG, f"{headline}: {verdict.sentences[0]}")
        print(text, file=sys.stderr, flush=True)
