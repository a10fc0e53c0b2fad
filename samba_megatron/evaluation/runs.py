"""An evaluation's cases over ranks; one JSON line a result, so that an interrupted one goes on.

Each rank appends to a file of its own in the output folder. Which cases are left is read from all
of them, so the number of ranks may change in between.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

from samba_megatron.evaluation.subject import Subject
from samba_megatron.platform.distributed import Rank
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import write_text
from samba_megatron.platform.progress import Progress
from samba_megatron.tracking import json_lines

SETTINGS, RESULTS = "settings.json", "results.json"
_LONGEST = timedelta(days=1)


class Suite(Protocol):
    """Questions to a model, and what their answers come to."""

    @property
    def name(self) -> str:
        """``passkey`` …"""
        ...

    def settings(self) -> dict[str, Any]:
        """What decides the results: an interrupted evaluation goes on only with the same."""
        ...

    def cases(self) -> list[Any]:
        """All there is to do."""
        ...

    def batches(self, done: set[str]) -> Iterator[list[Any]]:
        """What is left to do, in pieces for a rank."""
        ...

    def run(self, subject: Subject, batch: list[Any]) -> list[dict[str, Any]]:
        """The records of a batch, each with its name under ``case``."""
        ...

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """The results' figures."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What an evaluation has come to."""

    results: dict[str, Any]
    """The content of ``results.json``."""
    finished: bool
    """Whether all cases are done."""


def join_world(rank: Rank) -> None:
    """Meets the other ranks, if there are any."""
    if rank.world_size > 1:
        import torch.distributed

        torch.distributed.init_process_group("gloo", timeout=_LONGEST)


def leave_world(rank: Rank) -> None:
    """The end of :func:`join_world`."""
    if rank.world_size > 1:
        import torch.distributed

        torch.distributed.destroy_process_group()


def evaluate(
    suite: Suite, subject: Subject, output: Path, rank: Rank, seconds: float | None = None
) -> Outcome | None:
    """Does what is left of a suite.

    Args:
        suite: what to do.
        subject: the model.
        output: folder of the results; what is there of the same evaluation is gone on with.
        rank: this process's place; every rank must call this.
        seconds: begin no case after so long.

    Returns:
        The outcome, on rank 0.

    Raises:
        UserError: the folder holds another evaluation.
    """
    _claim(output, suite, subject, rank)
    done = {record["case"] for record in _records(output)}
    _barrier(rank)
    batches = list(suite.batches(done))[rank.rank :: rank.world_size]
    _run_batches(suite, subject, batches, output / f"cases-{rank.rank:05d}.jsonl", rank, seconds)
    _barrier(rank)
    if rank.rank:
        return None
    return _conclude(suite, subject, output)


def _claim(output: Path, suite: Suite, subject: Subject, rank: Rank) -> None:
    """Writes what is evaluated to the folder, or makes sure that it is what is there."""
    wanted = json.loads(
        json.dumps({"suite": suite.name, **suite.settings(), "model": subject.identity})
    )
    file = output / SETTINGS
    if rank.rank == 0 and not file.exists():
        try:
            output.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(wanted, indent=2) + "\n")
        except OSError as problem:
            raise UserError(f"--output {output} cannot be written: {problem.strerror}") from None
    _barrier(rank)
    found = json.loads(file.read_text(encoding="utf-8"))
    different = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if different:
        raise UserError(
            f"--output {output} holds another evaluation ({', '.join(different)} differ): choose "
            "another folder, or give the same options to go on with it"
        )


def _records(output: Path) -> list[dict[str, Any]]:
    """All results there are, each case once."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(output.glob("cases-*.jsonl")):
        for record in json_lines.read(file, "case"):
            found[record["case"]] = record
    return list(found.values())


def _run_batches(
    suite: Suite,
    subject: Subject,
    batches: list[list[Any]],
    file: Path,
    rank: Rank,
    seconds: float | None,
) -> None:
    started, total = time.monotonic(), sum(map(len, batches))
    progress = Progress(
        total, lambda done, rate: f"{suite.name}: {done:,} of {total:,} cases", at_once=True
    )
    with open(file, "a", encoding="utf-8") as stream:
        if json_lines.ends_in_half_a_line(file):
            stream.write("\n")
        for batch in batches:
            if seconds is not None and time.monotonic() - started >= seconds:
                break
            for record in suite.run(subject, batch):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
            if rank.rank == 0:
                progress.add(len(batch))
    if rank.rank == 0:
        progress.close()


def _conclude(suite: Suite, subject: Subject, output: Path) -> Outcome:
    """Writes ``results.json`` from all records."""
    records = _records(output)
    count = len(suite.cases())
    results = {
        "suite": suite.name,
        "model": subject.identity,
        "settings": suite.settings(),
        "cases": len(records),
        "of": count,
        **suite.summary(records),
    }
    results = json.loads(json.dumps(results, default=str), parse_constant=lambda _: None)
    write_text(output / RESULTS, json.dumps(results, indent=2) + "\n")
    return Outcome(results, len(records) >= count)


def _barrier(rank: Rank) -> None:
    if rank.world_size > 1:
        import torch.distributed

        torch.distributed.barrier()
