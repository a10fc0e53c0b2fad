"""Who keeps the others waiting: one report out of the records that the ranks of a hung run left.

A rank is to blame if it left no record (its process is stopped, gone, or stuck where no Python
runs), or if it waits for nobody itself while others wait for it. Where every rank waits, the
collectives do not match, or all have entered the same one and the network or a device is at fault:
then that is said, and nobody is blamed.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Records = dict[int, dict[str, Any]]
"""What :func:`samba_megatron.training.evidence.collect` gave, by rank."""


@dataclass
class Verdict:
    """What is known about a hang."""

    sentences: list[str]
    """What happened, the most telling first."""
    culprits: list[int] = field(default_factory=list)
    """Ranks to blame; empty where that cannot be told."""


@dataclass(frozen=True)
class _Missing:
    """A collective that ``rank`` has not entered while others wait in it."""

    rank: int
    operation: dict[str, Any]

    @property
    def text(self) -> str:
        """``all_reduce #81 (ranks 0-3)``."""
        return describe(self.operation)


def find_culprits(records: Records, nodes: list[str]) -> Verdict:
    """Compares the records.

    Args:
        records: of the ranks that left one.
        nodes: the node of each rank of the world, by rank.
    """
    missing = {item.rank: item for item in _not_entered(records, len(nodes))}
    absent = [rank for rank in range(len(nodes)) if rank not in records]
    idle = [rank for rank, record in sorted(records.items()) if not record["waits"]]
    sentences = [
        f"rank {rank} on {nodes[rank]} {_never_entered(missing.get(rank))}; it stands at "
        f"{last_line(records[rank])}"
        for rank in idle
    ]
    sentences += [
        f"rank {rank} on {nodes[rank]} left no record: its process is stopped, gone, or stuck "
        "outside Python"
        for rank in absent
    ]
    if sentences:
        return Verdict(sentences, sorted([*idle, *absent]))
    return Verdict(_nobody_to_blame(records, missing))


def _never_entered(missing: _Missing | None) -> str:
    return f"never entered {missing.text}" if missing else "waits for no other rank"


def _not_entered(records: Records, world_size: int) -> Iterator[_Missing]:
    """Who has not entered what others wait in, of the ranks that left a record."""
    for record in records.values():
        for operation in record["pending"]:
            if operation["point_to_point"]:
                continue
            for rank in operation["ranks"] or range(world_size):
                if rank not in records:
                    continue
                if records[rank]["entered"].get(operation["group"], 0) < operation["number"]:
                    yield _Missing(rank, operation)


def _nobody_to_blame(records: Records, missing: dict[int, _Missing]) -> list[str]:
    waits = {
        rank: ", ".join(describe(operation) for operation in record["pending"])
        or f"a send or receive at {last_line(record)}"
        for rank, record in records.items()
    }
    places = _grouped(waits)
    if missing:
        first = "every rank waits for another one: the collectives do not match"
    elif len(places) == 1:
        first = "all ranks have entered the same collective and none gets out: network or device"
    else:
        first = "every rank waits, and all that others wait for has been entered"
    return [first, *(f"{ranks_text(ranks)} in {place}" for place, ranks in places.items())]


def report(records: Records, nodes: list[str], verdict: Verdict, headline: str) -> str:
    """The whole report, for people.

    Args:
        records: of the ranks that left one.
        nodes: the node of each rank.
        verdict: what :func:`find_culprits` found.
        headline: what the watchdog saw.
    """
    lines = [headline, "", *(f"- {sentence}" for sentence in verdict.sentences), ""]
    waiting = [rank for rank, record in records.items() if record["waits"]]
    if waiting:
        lines += [f"waiting for others: {ranks_text(waiting)}", ""]
    for rank in verdict.culprits:
        if rank in records:
            lines += [f"rank {rank} on {nodes[rank]} {_where(records[rank])}"]
            lines += [*_stack_lines(records[rank]), ""]
    others = {
        rank: "\n".join([_where(record), *_stack_lines(record)])
        for rank, record in records.items()
        if rank not in verdict.culprits
    }
    for text, ranks in _grouped(others).items():
        lines += [f"{ranks_text(ranks)} {text}", ""]
    return "\n".join(lines)


def describe(operation: dict[str, Any]) -> str:
    """``all_reduce #8123 (all ranks)``: a collective and its number in its group."""
    members = operation["ranks"]
    whom = f"ranks {_spans(members)}" if members else "all ranks"
    return f"{operation['name']} #{operation['number']} ({whom})"


def last_line(record: dict[str, Any]) -> str:
    """``file:line in function: code``, where Python stands."""
    if not record["stack"]:
        return "an unknown line"
    frame = record["stack"][-1]
    code = f": {frame['code']}" if frame["code"] else ""
    return f"{frame['file']}:{frame['line']} in {frame['function']}{code}"


def ranks_text(ranks: list[int]) -> str:
    """``ranks 0-2, 5``, or ``rank 3``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)}"


def _spans(ranks: list[int]) -> str:
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(f"{low}-{high}" if low < high else f"{low}" for low, high in spans)


def _where(record: dict[str, Any]) -> str:
    pending = ", ".join(describe(operation) for operation in record["pending"])
    return f"in {record['phase']}" + (f", waiting in {pending}" if pending else "") + ":"


def _stack_lines(record: dict[str, Any]) -> list[str]:
    return [
        f"    {frame['file']}:{frame['line']} in {frame['function']}: {frame['code']}"
        for frame in record["stack"]
    ]


def _grouped(texts: dict[int, str]) -> dict[str, list[int]]:
    """Ranks by what is said of them: thousands say the same."""
    groups: dict[str, list[int]] = {}
    for rank, text in sorted(texts.items()):
        groups.setdefault(text, []).append(rank)
    return groups
