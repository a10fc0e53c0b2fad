"""Sends a run's ``metrics.jsonl`` to a tracking service, from a process of its own.

The training loop writes a line to a local file and is done. This process reads the file, in order,
from where it last stopped, and tries again for as long as a service is slow, failing or away. It
may be killed at any moment and started again (:data:`STATE_NAME` says how far it came), and it can
be run by hand after the fact:

    python -m samba_megatron.tracking.shipping RUN --tracking-uri sqlite:///mlflow.db

Steps that a killed run had done after its last checkpoint, and that the resumed run does again, are
sent once.
"""

import argparse
import fcntl
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from samba_megatron.config import RunConfig
from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.files import write_text
from samba_megatron.tracking import json_lines
from samba_megatron.tracking.metrics import FILE_NAME
from samba_megatron.tracking.sink import Sink, SinkUnavailable

STATE_NAME = "shipped.json"
LOG_NAME = "shipping.log"
LOCK_NAME = "shipping.lock"
_BLOCK = 2000
"""Records at a time, at most."""
_DESCRIPTIONS = ("layout", "kernels", "versions", "device", "parameters")
"""What a start record says besides the configuration."""
_POLL_SECONDS = 1.0
_LONGEST_WAIT = 60.0
_SECONDS_TO_FINISH = 20.0
_ROOT = Path(__file__).resolve().parents[2]

Process = subprocess.Popen[bytes]

Point = tuple[int, float, dict[str, float]]
Deadline = Callable[[], float]
"""Until when it is worth trying, by time.monotonic()."""


class Shipper:
    """Reads a run's records and hands them to a sink, each once.

    Args:
        run_dir: the run's folder.
        sink: where to.
        say: gets sentences for the log.
        state_name: file in the run's folder that says how far it came; one for each service.
    """

    def __init__(
        self, run_dir: Path, sink: Sink, say: Callable[[str], None], state_name: str = STATE_NAME
    ) -> None:
        self._file = run_dir / FILE_NAME
        self._state_path = run_dir / state_name
        self._sink, self._say = sink, say
        self._state: dict[str, Any] = {"offset": 0, "last": {}, "run": {}, "identity": ""}
        if self._state_path.exists():
            self._state |= json.loads(self._state_path.read_text())
        self._wait = 0.0
        self.ended = False
        """The last record sent is the end of a job."""

    def open(self, tags: dict[str, str], until: Deadline) -> bool:
        """Finds or makes the run at the sink; false when ``until`` came first.

        The run's identity is on the disk before the service hears of it, so that one that was made
        just before this process was killed is found again.
        """
        if not self._state["identity"]:
            self._state["identity"] = uuid.uuid4().hex
            self._save()
        state, identity = self._state["run"], self._state["identity"]
        opened = self._persist(lambda: self._sink.open(state, tags, identity), until)
        if opened is None:
            return False
        self._state["run"] = opened
        self._save()
        return True

    def behind(self) -> bool:
        """Whether there are records that were not sent."""
        return bool(self._read()[0])

    def ship(self, until: Deadline) -> int:
        """Sends what has come since; how many records, 0 when there were none or time was over."""
        records, offset = self._read()
        if not records:
            return 0
        last = dict(self._state["last"])
        points = list(_points(records, last))
        if self._persist(lambda: self._send(records, points), until) is None:
            return 0
        self._state |= {"offset": offset, "last": last}
        self._save()
        self.ended = records[-1]["kind"] == "end"
        return len(records)

    def _send(self, records: list[dict[str, Any]], points: list[Point]) -> bool:
        for record in records:
            if record["kind"] == "start":
                described = {name: record.get(name, {}) for name in _DESCRIPTIONS}
                self._sink.parameters(flatten(record.get("config", {})) | flatten(described))
        self._sink.metrics(points)
        for record in records[-1:]:
            if record["kind"] == "end":
                self._sink.close(int(record["exit_code"]))
        return True

    def _persist[T](self, call: Callable[[], T], until: Deadline) -> T | None:
        """Calls until it works, waiting longer each time; None when ``until`` came first."""
        while True:
            try:
                result = call()
            except SinkUnavailable as problem:
                self._wait = min(max(2 * self._wait, 1.0), _LONGEST_WAIT)
                self._say(f"not reached, trying again in {self._wait:.0f} s: {problem}")
                if time.monotonic() + self._wait > until():
                    return None
                time.sleep(self._wait)
                continue
            if self._wait:
                self._say("reached again")
            self._wait = 0.0
            return result

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The next records, whole lines only, and the place after them."""
        records: list[dict[str, Any]] = []
        offset = int(self._state["offset"])
        if not self._file.exists():
            return records, offset
        with open(self._file, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n") or len(records) == _BLOCK:
                    break
                offset += len(line)
                record = json_lines.parse(line, "kind")
                if record is not None:
                    records.append(record)
                    if record["kind"] == "end":
                        break
        return records, offset

    def _save(self) -> None:
        write_text(self._state_path, json.dumps(self._state))


def _points(records: list[dict[str, Any]], last: dict[str, int]) -> Iterator[Point]:
    """Steps and their numbers; ``last`` holds, by series, the last step sent, and is moved on."""
    for record in records:
        series = record["kind"]
        if series not in ("train", "validation", "checkpoint"):
            continue
        length = record.get("sequence_length")
        prefix = f"{series}/{length}/" if length else f"{series}/"
        step = int(record["step"])
        if step <= last.get(prefix, -1):
            continue  # done again after a kill
        last[prefix] = step
        values = {prefix + name: value for name, value in numbers(record).items()}
        yield step, float(record["time"]), values


def numbers(record: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, nested ones by dotted name."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if not prefix and name in ("kind", "time", "step", "sequence_length"):
            continue
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def start(run_dir: Path, uri: str, experiment: str, name: str) -> Process:
    """Starts the process beside a training run: it sends until the run has ended.

    It is in a session of its own, so that a signal to the job's ranks does not end it.
    """
    command = [sys.executable, "-m", "samba_megatron.tracking.shipping", str(run_dir)]
    command += ["--tracking-uri", uri, "--experiment", experiment, "--name", name]
    command += ["--follow", str(os.getpid())]
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(run_dir / LOG_NAME, "a") as log:
        return subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def beside(config: RunConfig) -> Process | None:
    """Starts the process that a run's configuration asks for; None where it asks for none."""
    logging = config.logging
    if logging.mlflow_tracking_uri is None:
        return None
    run_dir = Path(str(config.run_dir))
    return start(run_dir, logging.mlflow_tracking_uri, logging.mlflow_experiment, config.name)


def let_finish(process: Process | None) -> None:
    """Gives the process a moment to send the end of a run; a job takes it along when it ends."""
    if process is not None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_FINISH)


def main() -> None:
    """Sends all that is there, and with ``--follow`` what a process still writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--tracking-uri", required=True, help="sqlite:///PATH, http://HOST:PORT, …")
    parser.add_argument("--experiment", default="samba", help="MLflow experiment (samba)")
    parser.add_argument("--name", help="the run's name there (its folder's)")
    parser.add_argument("--follow", type=int, metavar="PID", help="go on while PID lives")
    patience = "seconds for a service that is away, when nothing more will come (60)"
    parser.add_argument("--patience", type=float, default=60.0, help=patience)
    arguments = parser.parse_args()
    if not (arguments.run / FILE_NAME).exists() and arguments.follow is None:
        raise UserError(f"{arguments.run} has no {FILE_NAME}: name a run's folder")
    _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from samba_megatron.tracking.mlflow_sink import MlflowSink

    arguments.run.mkdir(parents=True, exist_ok=True)
    name = arguments.name or arguments.run.resolve().name
    sink = MlflowSink(arguments.tracking_uri, arguments.experiment, name)
    until = Patience(arguments.follow, arguments.patience)
    with _alone(arguments.run):
        shipper = Shipper(arguments.run, sink, _say)
        if not shipper.open(_tags(), until):
            raise UserError(_unsent(arguments))
        while not (shipper.ended and not shipper.behind()):
            if not shipper.ship(until):
                if until() < float("inf"):
                    break
                time.sleep(_POLL_SECONDS)
        if shipper.behind():
            raise UserError(_unsent(arguments))
    _say("all records are sent")


class Patience:
    """Endless while a process lives; a number of seconds from the moment that it does not."""

    def __init__(self, process: int | None, seconds: float) -> None:
        self._process, self._seconds = process, seconds
        self._at: float | None = None

    def __call__(self) -> float:
        """The moment to give up, by time.monotonic()."""
        if self._process is not None and _lives(self._process):
            return float("inf")
        if self._at is None:
            self._at = time.monotonic() + self._seconds
        return self._at


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """One process at a time sends a run's records: a later one waits for an earlier one."""
    with open(run_dir / LOCK_NAME, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _unsent(arguments: argparse.Namespace) -> str:
    return (
        f"{arguments.tracking_uri} was not reached, and records of {arguments.run} are not sent "
        "yet: they are safe in its metrics.jsonl; run this command again later"
    )


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _tags() -> dict[str, str]:
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_JOB_NODELIST")
    return {name.lower(): os.environ[name] for name in names if os.environ.get(name)}


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


if __name__ == "__main__":
    run_command(main)
