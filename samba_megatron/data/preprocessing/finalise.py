"""Ends a run: joins shards if asked to, writes manifests and the blend file that a recipe takes."""

import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from samba_megatron import __version__
from samba_megatron.data.indexed import (
    IndexedWriter,
    bin_path,
    read_index,
    sequence_lengths,
)
from samba_megatron.data.manifest import (
    DatasetRecord,
    InputRecord,
    Manifest,
    manifest_path,
    write_manifest,
)
from samba_megatron.data.preprocessing.account import EXAMPLES, counts_of
from samba_megatron.data.preprocessing.options import PreprocessReport
from samba_megatron.data.preprocessing.shard_writer import Job, split_prefix
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

_MERGE_TOKENS = 8 << 20
_MERGE_DOCUMENTS = 1 << 20


def finalise(job: Job, report: PreprocessReport, started: float) -> None:
    """Writes what describes the shards of a run that are all complete, and fills ``report``.

    Raises:
        UserError: nothing was written, or too many places were unusable.
    """
    records = [_record_of(job, shard.number) for shard in job.shards]
    _sum(report, records)
    _check(job, report)
    datasets = [DatasetRecord(**entry) for record in records for entry in record["datasets"]]
    if job.options.merge and len(job.shards) > 1:
        datasets = [_merge(job, split, datasets) for split in job.splits]
        datasets = [entry for entry in datasets if entry.documents]
    inputs = [InputRecord(**entry) for record in records for entry in record["inputs"]]
    report.seconds = time.monotonic() - started
    # The training split last: its manifest says that all is there.
    for split in reversed(job.splits):
        mine = [entry for entry in datasets if entry.split == split]
        prefix = split_prefix(job.options.output_prefix, split)
        report.splits[split] = {
            "documents": sum(entry.documents for entry in mine),
            "tokens": sum(entry.tokens for entry in mine),
        }
        if mine:
            report.blend_files.insert(0, write_blend(prefix, mine))
            write_manifest(prefix, _manifest(job, report, split, mine, inputs))


def _record_of(job: Job, number: int) -> dict[str, Any]:
    record = job.workspace.read_record(number)
    if record is None:
        raise UserError(
            f"shard {number} is not complete: run the same command again, it is done again"
        )
    return record


def _sum(report: PreprocessReport, records: list[dict[str, Any]]) -> None:
    for record in records:
        report.add(counts_of(record))
        report.skipped_examples += record["examples"]
    del report.skipped_examples[EXAMPLES:]


def _check(job: Job, report: PreprocessReport) -> None:
    options = job.options
    if options.on_error == "fail" and report.skipped.total() > options.max_errors:
        raise UserError(
            f"{report.skipped.total()} places hold no usable document, more than --max-errors "
            f"{options.max_errors}: {'; '.join(report.skipped_examples)}"
        )
    if report.documents == 0:
        job.workspace.remove()
        where = "after the stages there are" if options.stages else "the inputs hold"
        raise UserError(f"{where} no documents, {options.output_prefix} was not written")


def write_blend(prefix: str, datasets: list[DatasetRecord]) -> str:
    """Writes ``P.blend.yaml``: the datasets with their weights, each counting by its tokens."""
    path = Path(f"{prefix}.blend.yaml")
    with atomic_write(path) as stream:
        stream.write("# For data.blend_file of a recipe. Prefixes start at this file's folder.\n")
        stream.write("sources:\n")
        for entry in datasets:
            name = json.dumps(entry.name, ensure_ascii=False)
            stream.write(
                f"- name: {name}\n  prefix: {name}\n  tokens: {entry.tokens}\n"
                f"  documents: {entry.documents}\n  weight: {entry.tokens}\n"
            )
    return str(path)


def _merge(job: Job, split: str, datasets: list[DatasetRecord]) -> DatasetRecord:
    """Joins a split's shards, streaming; the shards go when the whole is published."""
    mine = [entry for entry in datasets if entry.split == split]
    target = split_prefix(job.options.output_prefix, split)
    if not mine:
        return DatasetRecord(Path(target).name, split, 0, 0, "", -1, 0, 0, "")
    manifest_path(target).unlink(missing_ok=True)
    prefixes = [str(job.workspace.folder / "datasets" / entry.name) for entry in mine]
    with IndexedWriter(target, mine[0].dtype) as writer:
        for prefix in prefixes:
            for tokens, lengths in _runs(prefix):
                writer.add(tokens, lengths)
        return DatasetRecord.finish(writer, target, split)


def _runs(prefix: str) -> Iterator[tuple[Any, Any]]:
    """A dataset's tokens and lengths in runs of whole documents."""
    info, lengths = read_index(prefix), sequence_lengths(prefix)
    ends = np.cumsum(lengths, dtype=np.int64)
    first, position = 0, 0
    with open(bin_path(prefix), "rb") as stream:
        while first < info.documents:
            last = int(np.searchsorted(ends, position + _MERGE_TOKENS, side="right"))
            last = min(max(last, first + 1), first + _MERGE_DOCUMENTS)
            count = int(ends[last - 1]) - position
            yield np.fromfile(stream, info.dtype, count), np.asarray(lengths[first:last])
            first, position = last, position + count


def _manifest(
    job: Job,
    report: PreprocessReport,
    split: str,
    datasets: list[DatasetRecord],
    inputs: list[InputRecord],
) -> Manifest:
    options = job.options
    counts = report.as_dict()
    kept = ("text_bytes", "read_bytes", "lines", "blank_lines", "skipped")
    return Manifest(
        inputs=inputs,
        tokenizer=dict(job.described),
        options=options.deciding(),
        counts={
            **report.splits[split],
            **{name: counts[name] for name in kept},
            "skipped_examples": report.skipped_examples,
            "split": split,
        },
        datasets=datasets,
        stages=report.stages,
        made_by={
            "samba_megatron": __version__,
            **{name: version(name) for name in ("datatrove", "gigatoken", "tokenizers", "numpy")},
            "python": platform.python_version(),
            "engine": str(job.engine),
            "tokenizer_path": str(Path(options.tokenizer).absolute()),
            "workers": options.workers,
            "slurm": options.slurm is not None,
            "seconds": round(report.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
