"""The run's ledger: order, half lines, several writers."""

import subprocess
import sys
from pathlib import Path

import pytest

from samba_megatron.tracking import ledger


def test_events_come_back_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds can be picked; a Slurm job's id and restart count are added by themselves."""
    assert ledger.read(tmp_path) == []
    ledger.append(tmp_path, "start", step=0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    ledger.append(tmp_path, "end", cause=ledger.Cause.DONE, step=9)
    start, end = ledger.read(tmp_path)
    assert (start["event"], start["step"], "job" in start) == ("start", 0, False)
    assert (end["cause"], end["job"], end["restart"]) == ("done", 17, 2)
    assert ledger.read(tmp_path, "end") == [end]


def test_half_a_line_hurts_nobody(tmp_path: Path) -> None:
    """A killed writer's rest is skipped, and the next event is not glued to it."""
    ledger.append(tmp_path, "start", step=0)
    with open(tmp_path / ledger.FILE_NAME, "a") as file:
        file.write('{"event": "fau')
    ledger.append(tmp_path, "end", step=1)
    assert [record["event"] for record in ledger.read(tmp_path)] == ["start", "end"]


def test_writers_do_not_mix(tmp_path: Path) -> None:
    """Four processes append at once; every line is whole."""
    code = (
        "import sys; from pathlib import Path; from samba_megatron.tracking import ledger\n"
        "for n in range(50): ledger.append(Path(sys.argv[1]), 'fault', text='x' * 900, n=n)"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert len(ledger.read(tmp_path, "fault")) == 200
