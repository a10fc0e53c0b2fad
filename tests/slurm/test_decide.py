"""Why a job ended and what follows, from evidence as it was seen on a real Slurm."""

import pytest

from samba_megatron.tracking.ledger import Cause
from slurm.decide import Decision, Evidence, FirstFailure, decide, find_cause

RUNNING = {"JobState": "RUNNING", "PreemptTime": "None"}
GLOO = {
    "code": 1,
    "cause": "bug",
    "reason": "rank 0 on n1: RuntimeError: Connection closed by peer",
}
KILLED = FirstFailure("n2", "3", "Killed")

CASES: dict[str, tuple[Evidence, Cause]] = {
    "done": (Evidence(0, {"code": 0, "cause": "done"}), Cause.DONE),
    "signal near the limit": (
        Evidence(75, {"cause": None}, RUNNING, seconds_left=580, signal_lead=600),
        Cause.TIME_LIMIT,
    ),
    "signal far from the limit": (
        Evidence(75, {"cause": None}, RUNNING, seconds_left=9000, signal_lead=600),
        Cause.PREEMPTED,
    ),
    "Slurm says preempted": (
        Evidence(
            75,
            {"cause": None},
            {"JobState": "RUNNING", "PreemptTime": "2026-11-24T13:29:00"},
            seconds_left=300,
            signal_lead=600,
        ),
        Cause.PREEMPTED,
    ),
    "a person's stop": (Evidence(75, {"cause": "user stop"}, RUNNING), Cause.USER_STOP),
    "own clock": (
        Evidence(75, {"cause": "time limit"}, RUNNING, seconds_left=9000),
        Cause.TIME_LIMIT,
    ),
    "scancel, saved": (Evidence(75, {"cause": None}, {"JobState": "CANCELLED"}), Cause.USER_STOP),
    "scancel, too slow": (Evidence(137, None, {"JobState": "CANCELLED"}), Cause.USER_STOP),
    "scancel, still ending": (
        Evidence(75, {"cause": None}, {"JobState": "COMPLETING"}, is_ending_early=True),
        Cause.USER_STOP,
    ),
    "ended before the limit": (
        Evidence(137, None, RUNNING, is_out_of_time=True, first=KILLED),
        Cause.TIME_LIMIT,
    ),
    "limit, still ending": (Evidence(143, None, {"JobState": "COMPLETING"}), Cause.TIME_LIMIT),
    "limit, not saved": (Evidence(143, None, {"JobState": "TIMEOUT"}), Cause.TIME_LIMIT),
    # The peers of a dead node write of broken connections.
    "node down": (Evidence(1, GLOO, RUNNING, dead_nodes={"n2": "down*"}), Cause.NODE_FAILURE),
    "node failed": (Evidence(1, GLOO, {"JobState": "NODE_FAIL"}), Cause.NODE_FAILURE),
    # So do those of a process that the kernel killed.
    "killed": (Evidence(1, GLOO, RUNNING, first=KILLED), Cause.OUT_OF_MEMORY),
    "words in a log": (
        Evidence(1, GLOO, RUNNING, out_of_memory="torch.OutOfMemoryError: CUDA out of memory"),
        Cause.OUT_OF_MEMORY,
    ),
    "bug": (Evidence(1, GLOO, RUNNING), Cause.BUG),
    "hang": (Evidence(78, {"code": 78, "cause": "hang", "reason": "rank 3"}), Cause.HANG),
    "nothing but a code": (Evidence(77), Cause.BAD_NODE),
    "nothing at all": (Evidence(5), Cause.BUG),
    "user error": (Evidence(2, {"code": 2, "cause": "user error"}), Cause.USER_ERROR),
    "non-finite": (Evidence(76, {"code": 76, "cause": "non-finite"}), Cause.NON_FINITE),
}


@pytest.mark.parametrize("name", CASES)
def test_cause(name: str) -> None:
    evidence, cause = CASES[name]
    assert find_cause(evidence).cause == cause
    assert find_cause(evidence).reason


@pytest.mark.parametrize(
    ("cause", "code", "failures", "decision"),
    [
        (Cause.DONE, 0, 0, Decision.DONE),
        (Cause.USER_STOP, 75, 0, Decision.STOP),
        (Cause.TIME_LIMIT, 75, 0, Decision.REQUEUE),
        (Cause.PREEMPTED, 75, 0, Decision.REQUEUE),
        (Cause.NODE_FAILURE, 1, 1, Decision.REQUEUE),
        (Cause.BUG, 1, 1, Decision.REQUEUE),
        (Cause.BUG, 1, 2, Decision.REQUEUE),
        (Cause.BUG, 1, 3, Decision.HOLD),
        (Cause.BAD_NODE, 77, 3, Decision.HOLD),
        (Cause.USER_ERROR, 2, 1, Decision.HOLD),
        (Cause.NON_FINITE, 76, 1, Decision.HOLD),
        (Cause.BUG, 76, 1, Decision.HOLD),
    ],
)
def test_decision(cause: Cause, code: int, failures: int, decision: Decision) -> None:
    assert decide(cause, code, failures, limit=3) == decision
