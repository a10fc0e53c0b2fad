"""What the ledger hears of failures: the first one counts, and each kind has its cause."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking import ledger
from samba_megatron.training import endings
from samba_megatron.training.endings import RunLog, is_out_of_memory


def fail(run_dir: Path, error: BaseException) -> None:
    log = RunLog(run_dir, run_dir / "checkpoints")
    with pytest.raises(type(error)):
        with log.failures_recorded():
            log.step = 7
            raise error


CAUSES = {
    "bug": (ZeroDivisionError("division by zero"), 1, "bug"),
    "user error": (UserError("data.data_path is empty"), 2, "user error"),
    "hold": (ExitWith(ExitCode.HOLD, "weights are not finite"), 76, "non-finite"),
    "hold, cause given": (ExitWith(ExitCode.HOLD, "x", cause="user error"), 76, "user error"),
    "device memory": (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory"),
    "host memory": (MemoryError(), 1, "out of memory"),
    "interrupted": (KeyboardInterrupt(), 130, "user stop"),
}


@pytest.mark.parametrize("name", CAUSES)
def test_each_exception_has_a_code_and_a_cause(tmp_path: Path, name: str) -> None:
    error, code, cause = CAUSES[name]
    fail(tmp_path, error)
    (failure,) = ledger.read(tmp_path, "failure")
    assert (failure["rank"], failure["step"], failure["type"]) == (0, 7, type(error).__name__)
    (end,) = ledger.read(tmp_path, "end")
    assert (end["code"], end["cause"], end["step"]) == (code, cause, 7)
    assert end["checkpoint_step"] is None


def test_a_bug_says_where(tmp_path: Path) -> None:
    fail(tmp_path, ZeroDivisionError("division\nby zero"))
    (end,) = ledger.read(tmp_path, "end")
    assert "rank 0 on " in end["reason"] and "ZeroDivisionError: division (" in end["reason"]
    assert "test_endings.py:" in end["reason"] and "in fail" in end["reason"]


def test_the_first_failure_of_a_job_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer whose connection breaks adds nothing; the next job has an end of its own."""
    peer = RunLog(tmp_path, tmp_path / "checkpoints")
    monkeypatch.setenv("RANK", "3")
    fail(tmp_path, ValueError("the cause"))
    peer.failure(RuntimeError("Connection closed by peer"))
    (end,) = ledger.read(tmp_path, "end")
    assert "rank 3 on " in end["reason"] and "the cause" in end["reason"]
    time.sleep(0.01)  # the ledger's clock has milliseconds
    fail(tmp_path, ValueError("another job's"))
    assert len(ledger.read(tmp_path, "end")) == 2


def test_a_mistake_that_all_ranks_find_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rank 0, for which the others wait; one that only another rank finds is not lost."""
    monkeypatch.setenv("RANK", "1")
    error = UserError("data.data_path is empty")
    logs = {rank: RunLog(tmp_path / "all", tmp_path) for rank in (1, 0)}
    logs[0]._rank = 0
    rank_0_is_done = threading.Event()
    # As long as rank 0 takes, whatever the disk does, in place of the second that it has.
    waits = SimpleNamespace(time=time.time, sleep=lambda seconds: rank_0_is_done.wait(60))
    monkeypatch.setattr(endings, "time", waits)

    def write(rank: int) -> None:
        logs[rank].failure(error)
        if rank == 0:
            rank_0_is_done.set()

    with ThreadPoolExecutor() as ranks:
        list(ranks.map(write, logs))
    assert [record["rank"] for record in ledger.read(tmp_path / "all", "failure")] == [0]
    fail(tmp_path / "one", error)
    assert [record["rank"] for record in ledger.read(tmp_path / "one", "failure")] == [1]


def test_a_ledger_out_of_reach_hides_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    fail(tmp_path / "file", ValueError("the error"))
    assert "run.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"
            ),
            1,
        ),
        (RuntimeError("CUDA error: out of memory"), 1),
        (RuntimeError("shape mismatch"), 0),
        (ValueError("out of memory"), 0),
    ],
)
def test_memory_is_told_from_other_errors(error: Exception, expected: int) -> None:
    assert is_out_of_memory(error) == bool(expected)
