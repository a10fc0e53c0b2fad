"""One rank among several fails or hangs: all end soon, and the one to blame is named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.tracking import ledger
from tests.distributed.test_faults import command_line, wait_for
from tests.distributed.toy import ROOT, toy_config, write_dataset
from tests.ranks import free_port


def start_ranks(
    count: int, fault: tuple[int, int, str], config: dict[str, Any]
) -> "list[subprocess.Popen[str]]":
    """Training without a launcher, so that each rank's exit code is seen.

    Args:
        count: ranks.
        fault: rank, step and kind of the fault.
        config: fields of the run.
    """
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [
        sys.executable,
        str(ROOT / "tests" / "distributed" / "faulty_rank.py"),
        *map(str, fault),
    ]
    return [
        subprocess.Popen(
            [*command, *command_line(config)],
            env={
                **os.environ,
                **world,
                "OMP_NUM_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "SLURMD_NODENAME": f"n{rank}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end_all(processes: "list[subprocess.Popen[str]]", seconds: float) -> list[str]:
    """What each wrote to its standard error; those that do not end are killed."""
    deadline = time.monotonic() + seconds
    errors = []
    try:
        for process in processes:
            errors.append(process.communicate(timeout=max(deadline - time.monotonic(), 1.0))[1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return errors


@pytest.mark.timeout(400)
def test_the_ranks_that_hang_are_named(tmp_path: Path) -> None:
    """Of four ranks one sleeps in Python and another one is stopped: code 78 and a report."""
    run_dir = tmp_path / "run"
    fields: dict[str, Any] = {"faults.hang_timeout_minutes": 0.4, "checkpoint.save_interval": 2}
    config = toy_config(write_dataset(tmp_path), run_dir, **fields)
    processes = start_ranks(4, (1, 5, "hang"), config)
    wait_for(processes[0], run_dir / "hangs", "now")
    time.sleep(3)  # until the others wait for rank 1
    processes[3].send_signal(signal.SIGSTOP)
    errors = end_all([processes[n] for n in (0, 1, 2)], 240)
    processes[3].kill()
    processes[3].communicate()
    assert [process.returncode for process in processes[:3]] == [78] * 3, errors

    (hang,) = ledger.read(run_dir, "hang")
    assert hang["culprits"] == [{"rank": 1, "host": "n1"}, {"rank": 3, "host": "n3"}]
    sleeps, stopped = hang["sentences"]
    assert sleeps.startswith("rank 1 on n1 never entered ") and " #" in sleeps
    assert "faulty_rank.py:" in sleeps and "in faulty: time.sleep(10_000)" in sleeps
    assert stopped.startswith("rank 3 on n3 left no record: its process is stopped")
    end = ledger.read(run_dir)[-1]
    assert (end["event"], end["code"], end["cause"], end["step"]) == ("end", 78, "hang", 4)
    assert end["checkpoint_step"] in (2, 4), "nothing is saved because of the hang"

    report = Path(hang["report"]).read_text()
    assert sleeps in report and "waiting for others: ranks 0, 2" in report
    assert "ranks 0, 2 in step 5, waiting in " in report
    assert report in errors[0]
    records = [json.loads(path.read_text()) for path in Path(hang["report"]).parent.glob("*.json")]
    assert sorted(record["rank"] for record in records) == [0, 1, 2]


@pytest.mark.timeout(400)
def test_a_rank_that_raises_ends_all_and_is_the_cause(tmp_path: Path) -> None:
    """The others' broken connections are not what is written down."""
    run_dir = tmp_path / "run"
    processes = start_ranks(3, (2, 3, "raise"), toy_config(write_dataset(tmp_path), run_dir, **{
        "training.global_batch_size": 6,
    }))  # fmt: skip
    wait_for(processes[0], run_dir / "metrics.jsonl", '"train"')
    started = time.monotonic()
    errors = end_all(processes, 120)
    # A failed rank that waits for its peers is ended after a minute: nothing waited for that.
    assert time.monotonic() - started < 55
    assert all(process.returncode == 1 for process in processes), errors
    assert "this rank's data are broken" in errors[2]
    (failure,) = ledger.read(run_dir, "failure")
    assert (failure["rank"], failure["host"], failure["type"]) == (2, "n2", "ValueError")
    (end,) = ledger.read(run_dir, "end")
    assert (end["code"], end["cause"], end["step"]) == (1, "bug", 2)
    assert "rank 2 on n2: ValueError: this rank's data are broken" in end["reason"]
    assert "faulty_rank.py:" in end["reason"]
