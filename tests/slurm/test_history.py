"""The run's past from its ledger: starts, ends, lost jobs, failures in a row, bad nodes."""

from pathlib import Path

import pytest

from samba_megatron.tracking import ledger
from slurm import history


def attempt(run: Path, job: int, before: int, after: int, cause: str, decision: str) -> None:
    """A start and its end."""
    ledger.append(run, "job_start", job=job, nodes=["n1", "n2"], checkpoint=before)
    end = {"cause": cause, "decision": decision, "checkpoint": after}
    ledger.append(run, "job_end", job=job, code=1, **end)


def row(run: Path) -> list[int]:
    return [found.job for found in history.failures_in_a_row(history.attempts(run))]


@pytest.fixture(autouse=True)
def outside_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def test_failures_count_until_there_is_progress_or_a_hold(tmp_path: Path) -> None:
    attempt(tmp_path, 1, -1, -1, "bug", "requeue")
    assert row(tmp_path) == [1]
    attempt(tmp_path, 2, -1, 10, "bug", "requeue")
    assert row(tmp_path) == []
    attempt(tmp_path, 3, 10, 10, "hang", "requeue")
    attempt(tmp_path, 4, 10, 10, "preempted", "requeue")
    attempt(tmp_path, 5, 10, 10, "node failure", "requeue")
    assert row(tmp_path) == [5, 3]
    attempt(tmp_path, 6, 10, 10, "bug", "hold")
    assert row(tmp_path) == []


def test_progress_ends_the_row_whatever_ended_the_job(tmp_path: Path) -> None:
    for job, (before, cause) in enumerate(
        [(-1, "bug"), (-1, "preempted"), (10, "bug"), (10, "preempted"), (20, "bug")], 1
    ):
        after = before if cause == "bug" else before + 10 + (before < 0)
        attempt(tmp_path, job, before, after, cause, "requeue")
    assert row(tmp_path) == [5]


def test_a_job_that_says_no_end_is_a_lost_node(tmp_path: Path) -> None:
    """Its restart has the same id; the end written later belongs to the right start."""
    ledger.append(tmp_path, "job_start", job=7, nodes=["n1", "n2"], checkpoint=10)
    history.settle_lost(tmp_path, 20, {"n2": "down*"})
    ledger.append(tmp_path, "job_start", job=7, restart=1, nodes=["n1", "n3"], checkpoint=20)
    lost, now = history.attempts(tmp_path)
    assert (lost.cause, lost.has_progress, now.ended) == ("node failure", True, None)
    assert "n2 is down" in lost.reason
    history.settle_lost(tmp_path, 20, {})
    assert [a.cause for a in history.attempts(tmp_path)] == ["node failure"] * 2
    assert row(tmp_path) == [7]


def test_bad_nodes_add_up_until_they_are_forgiven(tmp_path: Path) -> None:
    ledger.append(tmp_path, "bad_nodes", nodes={"n1": "slow"})
    ledger.append(tmp_path, "bad_nodes", nodes={"n7": "no room"})
    assert history.bad_nodes(tmp_path) == {"n1": "slow", "n7": "no room"}
    ledger.append(tmp_path, "bad_nodes_forgiven")
    assert history.bad_nodes(tmp_path) == {}
