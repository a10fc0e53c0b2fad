"""Who is blamed for a hang, from the records of small worlds."""

from typing import Any

from samba_megatron.training.culprit import Records, find_culprits, ranks_text, report
from samba_megatron.training.evidence import stands_in_communication

NODES = ["n0", "n0", "n1", "n1"]


def operation(number: int, group: str = "0", ranks: list[int] | None = None) -> dict[str, Any]:
    return {"group": group, "ranks": ranks, "name": "all_reduce", "number": number,
            "point_to_point": False, "sizes": [[2]]}  # fmt: skip


def record(rank: int, line: int = 1, entered: dict[str, int] | None = None, pending: Any = None,
           waits: bool = True) -> dict[str, Any]:  # fmt: skip
    frame = {"file": "train.py", "line": line, "function": "step", "code": "f()"}
    return {"rank": rank, "host": NODES[rank], "phase": "step 5", "stack": [frame],
            "entered": entered or {}, "pending": pending or [], "waits": waits}  # fmt: skip


def test_a_rank_that_waits_for_nobody_is_to_blame() -> None:
    waiting: Records = {n: record(n, 1, {"0": 8}, [operation(8)]) for n in (0, 1, 3)}
    records = {**waiting, 2: record(2, 99, {"0": 7}, waits=False)}
    verdict = find_culprits(records, NODES)
    assert verdict.culprits == [2]
    (sentence,) = verdict.sentences
    assert sentence.startswith(
        "rank 2 on n1 never entered all_reduce #8 (all ranks); it stands at "
    )
    assert sentence.endswith("train.py:99 in step: f()")
    text = report(records, NODES, verdict, "step 5: no progress for 300 s")
    assert "ranks 0-1, 3 in step 5, waiting in all_reduce #8 (all ranks):" in text


def test_who_waits_behind_a_culprit_is_not_one() -> None:
    """Ranks 0 and 1 wait for each other's group only because 1 waits for 3, which left nothing."""
    inner, outer = operation(4, "7", [1, 3]), operation(9, "8", [0, 1])
    records = {
        0: record(0, entered={"8": 9}, pending=[outer]),
        1: record(1, entered={"7": 4, "8": 8}, pending=[inner]),
        2: record(2),  # in a send or receive
    }
    verdict = find_culprits(records, NODES)
    assert verdict.culprits == [3]
    assert verdict.sentences[0].startswith("rank 3 on n1 left no record")


def test_a_culprit_in_a_pipeline_is_told_without_numbers() -> None:
    """gloo's sends and receives are not recorded: the others stand in them, rank 1 does not."""
    records = {n: record(n, waits=n != 1) for n in range(4)}
    verdict = find_culprits(records, NODES)
    assert verdict.culprits == [1]
    assert "rank 1 on n0 waits for no other rank" in verdict.sentences[0]


def test_where_all_wait_nobody_is_blamed() -> None:
    same = {n: record(n, entered={"0": 8}, pending=[operation(8)]) for n in range(4)}
    verdict = find_culprits(same, NODES)
    assert verdict.culprits == [] and "network or device" in verdict.sentences[0]
    one, other = operation(5, "7", [0, 1]), operation(3, "8", [0, 1])
    crossed = {
        0: record(0, entered={"7": 5, "8": 2}, pending=[one]),
        1: record(1, entered={"7": 4, "8": 3}, pending=[other]),
    }
    verdict = find_culprits(crossed, NODES[:2])
    assert verdict.culprits == [] and "do not match" in verdict.sentences[0]
    assert "rank 0 in all_reduce #5 (ranks 0-1)" in verdict.sentences


def test_communication_is_known_by_its_innermost_line() -> None:
    inside = [{"file": "loop.py"}, {"file": "/x/torch/distributed/distributed_c10d.py"}]
    assert stands_in_communication(inside)
    assert not stands_in_communication([*inside, {"file": "/x/json/decoder.py"}])
    assert not stands_in_communication([])


def test_many_ranks_in_few_words() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([5, 0, 1, 2]) == "ranks 0-2, 5"
