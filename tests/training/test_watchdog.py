"""How long is too long; that what moves is left alone is shown by every other test that trains."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.tracking import ledger
from samba_megatron.training import watchdog
from samba_megatron.training.endings import RunLog
from samba_megatron.training.watchdog import Limits, Watchdog


def test_limits_are_learned_from_the_steps() -> None:
    limits = Limits(None, timeout_minutes=60)
    assert limits.seconds("step") == 300
    assert limits.seconds("first step") == 1500
    for seconds in (50, 60, 900, 60, 70):  # one had a pause in it
        limits.learn("step", seconds)
    assert limits.seconds("step") == 3 * 900
    assert limits.seconds("validation") == limits.seconds("save") == 1800
    limits.learn("save", 600)
    assert limits.seconds("save") == 3000 and limits.seconds("validation") == 1800


def test_the_report_comes_before_torch_gives_up() -> None:
    limits = Limits(None, timeout_minutes=10)
    limits.learn("step", 100)
    assert limits.seconds("step") == 540
    assert Limits(None, timeout_minutes=4).seconds("step") == 216


def test_a_limit_that_is_set_holds_everywhere() -> None:
    limits = Limits(2.0, timeout_minutes=10)
    limits.learn("step", 1000)
    kinds = ("step", "validation", "save", "first step")
    assert [limits.seconds(kind) for kind in kinds] == [120, 120, 120, 600]  # type: ignore[arg-type]


def test_phases_and_steps_are_learned_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    time_by_tens = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(watchdog, "time", time_by_tens)  # the libraries' threads have the real one
    dog = Watchdog(RunLog(tmp_path, tmp_path), RunConfig(), rank=0)
    dog.step(1)
    dog.step(2)  # the first step has warmed up: it teaches nothing
    dog.step(3)
    with dog.phase("save"):
        pass
    dog.step(4)  # no whole step lies before it
    dog.step(5)
    assert list(dog.limits._steps) == [10.0, 10.0]
    assert dog.limits._longest == {"step": 10.0, "save": 10.0}


PROGRAM = """
import sys, time
from pathlib import Path
from samba_megatron.config import RunConfig
from samba_megatron.training.endings import RunLog
from samba_megatron.training.watchdog import Watchdog
folder, config = Path(sys.argv[1]), RunConfig()
config.faults.hang_timeout_minutes = 2 / 60
dog = Watchdog(RunLog(folder, folder), config, rank=0)
dog.start(["n0"], "now")
for step in range(1, 31):
    dog.step(step)
    (folder / "steps").write_text(str(step))
    time.sleep(1000 if str(step) == sys.argv[2] else 0.2)
dog.stop()
"""


def start_program(folder: Path, sleeps_at: int) -> "subprocess.Popen[bytes]":
    """Thirty steps, at one of which it may fall asleep."""
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(sleeps_at)])


def wait_for_step_3(process: "subprocess.Popen[bytes]", steps: Path) -> None:
    """Or a later one; the file is empty for a moment whenever it is written."""
    while not steps.exists() or int(steps.read_text() or 0) < 3:
        assert process.poll() is None
        time.sleep(0.02)


def test_a_job_that_is_suspended_and_continued_does_not_hang(tmp_path: Path) -> None:
    process = start_program(tmp_path, sleeps_at=0)
    wait_for_step_3(process, tmp_path / "steps")
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    assert ledger.read(tmp_path) == []


def test_a_single_rank_that_sleeps_is_its_own_culprit(tmp_path: Path) -> None:
    assert start_program(tmp_path, sleeps_at=4).wait(60) == 78
    hang, end = ledger.read(tmp_path)
    assert hang["culprits"] == [{"rank": 0, "host": "n0"}]
    assert hang["seen"].startswith("step 4: no progress for ")
    assert (end["code"], end["cause"]) == (78, "hang")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    dog = Watchdog(RunLog(tmp_path, tmp_path), RunConfig(), rank=0)
    dog.start(["n0"], "now")
    dog.judge(RuntimeError("shape mismatch"))
    dog.stop()
