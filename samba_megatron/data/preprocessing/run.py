"""Turns a corpus into indexed datasets: plans shards, runs them anywhere, ends with a manifest.

Every run is the same pipeline: here over processes, with ``--slurm`` over an array of jobs. A shard
is published whole and then marked complete; a run that was stopped, however hard, goes on with the
shards that are not. What is started with other options, inputs or another tokenizer is refused.
"""

import json
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from samba_megatron.data.indexed import bin_path, idx_path
from samba_megatron.data.preprocessing.encoding import (
    Engine,
    SampleDocument,
    beginning,
    choose_engine,
)
from samba_megatron.data.preprocessing.existing import (
    discard_existing,
    is_up_to_date,
    refuse_foreign,
)
from samba_megatron.data.preprocessing.finalise import finalise
from samba_megatron.data.preprocessing.inputs import InputFile, find_inputs
from samba_megatron.data.preprocessing.options import PreprocessOptions, PreprocessReport
from samba_megatron.data.preprocessing.progress import watched
from samba_megatron.data.preprocessing.readers import PieceReader, place_name
from samba_megatron.data.preprocessing.shard_writer import Job, cannot_write
from samba_megatron.data.preprocessing.shards import Piece, Shard, plan_shards
from samba_megatron.data.preprocessing.slurm_job import active_job
from samba_megatron.data.preprocessing.stages import plan_stages
from samba_megatron.data.preprocessing.workspace import (
    Workspace,
    plan_differences,
    plan_of,
    release_claims,
)
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_SAMPLE_FILES = 8
_SAMPLE_BYTES = 1 << 18
_SAMPLE_DOCUMENT_BYTES = 1 << 15
_TEXT_SAMPLE_FILES = 64


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Makes the datasets that ``options`` describe, unless they are there already.

    Raises:
        UserError: an input, the tokenizer or a place in the data is unusable, or the prefix holds
            something made from something else; the message names it and the remedy.
    """
    started = time.monotonic()
    options.check()
    files, passed_over = find_inputs(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer)
    described = describe(tokenizer)
    report = PreprocessReport(prefix=options.output_prefix)
    report.warnings += _about_passed_over(passed_over)
    if is_up_to_date(options, files, described):
        report.up_to_date = True
        return report
    shards = plan_shards(files, options.shard_bytes)
    job = prepare(options, files, shards, tokenizer, report)
    _run(job, report)
    try:
        finalise(job, report, started)
        job.workspace.remove()
    finally:
        release_claims()
    return report


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """What of the tokenizer decides the output."""
    return {
        "identity": tokenizer.identity,
        "eod": tokenizer.eod,
        "vocab_size": tokenizer.vocab_size,
    }


def _about_passed_over(names: list[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return [f"{len(names)} files are of other kinds and are not read: {shown}"]


def prepare(
    options: PreprocessOptions,
    files: list[InputFile],
    shards: list[Shard],
    tokenizer: Tokenizer,
    report: PreprocessReport,
) -> Job:
    """Settles the engine and the workspace: a new one, or that of the run to go on with."""
    workspace = Workspace(options.output_prefix)
    described = describe(tokenizer)
    report.engine = settle_engine(options, tokenizer, shards, report.warnings)
    plan = plan_of(files, described, options.deciding_shards(), report.engine)
    plan = json.loads(json.dumps(plan))
    workspace.claim()
    try:
        _go_on_or_begin(options, workspace, plan, len(shards))
    except BaseException:
        release_claims()
        raise
    threads = len(shards) == 1 and options.workers > 1 and options.slurm is None
    _limit_threads(options.workers if threads else 1)
    return Job(
        options=options,
        engine=report.engine,
        shards=tuple(shards),
        threads=threads,
        described=tuple(described.items()),
    )


def _go_on_or_begin(
    options: PreprocessOptions, workspace: Workspace, plan: dict[str, Any], shards: int
) -> None:
    """Leaves a workspace with this plan: that of the run to go on with, or a new one."""
    old = None if options.overwrite else workspace.read_plan()
    if old is not None and (_finished_shards(workspace, shards) or active_job(workspace.folder)):
        if changed := plan_differences(old, plan):
            raise UserError(
                f"an unfinished run for {options.output_prefix} was made differently "
                f"({'; '.join(changed)}): give its options again, choose another --output-prefix, "
                "or give --overwrite to start again"
            )
    else:
        try:
            refuse_foreign(options)
        except UserError:
            if old is None:
                workspace.remove()
            raise
        discard_existing(options)
        workspace.clear()
    workspace.begin(plan)


def _finished_shards(workspace: Workspace, count: int) -> list[int]:
    return [number for number in range(count) if workspace.read_record(number)]


def _limit_threads(threads: int) -> None:
    """The tokenizers' libraries read these when they first start threads."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))


def settle_engine(
    options: PreprocessOptions, tokenizer: Tokenizer, shards: list[Shard], warnings: list[str]
) -> Engine:
    """The engine to use; a fallback leaves a warning."""
    if options.engine == "huggingface":
        return Engine.HUGGINGFACE
    engine, reason = choose_engine(tokenizer, _sample(shards, options.text_key))
    if reason:
        warnings.append(f"{reason}: Hugging Face tokenizers are used instead, many times slower")
    return engine


def _sample(shards: list[Shard], text_key: str) -> Iterator[SampleDocument]:
    """Documents from the starts of pieces spread over the inputs, about 256 KB in all."""
    pieces = [piece for shard in shards for piece in shard.pieces]
    files = _SAMPLE_FILES if pieces[0].file.kind != "plain text" else _TEXT_SAMPLE_FILES
    chosen = pieces[:: -(-len(pieces) // files)]
    share = _SAMPLE_BYTES // len(chosen)
    for piece in chosen:
        taken = 0
        for whole, place in _first_texts(piece, text_key, share):
            if taken < share:
                text = beginning(whole, _SAMPLE_DOCUMENT_BYTES)
                taken += len(text)
                yield SampleDocument(place, text)


def _first_texts(piece: Piece, text_key: str, size: int) -> Iterator[tuple[bytes, str]]:
    """The texts of a piece's first batch, with their places."""
    for batch in islice(PieceReader(piece, text_key, batch_bytes=size), 1):
        for text, place in zip(batch.texts, batch.places, strict=True):
            yield text, _place(piece, place)


def _place(piece: Piece, place: int) -> str:
    """The exact place where it costs nothing; counting lines of gigabytes for a sample would."""
    if piece.start == 0:
        return place_name(piece, place)
    return f"line {place} after byte {piece.start} of {piece.file.path}"


def _run(job: Job, report: PreprocessReport) -> None:
    """Does all shards that are not done yet."""
    # datatrove takes a second to import: only now is it certain to be needed.
    from samba_megatron.data.preprocessing.executors import make_executor
    from samba_megatron.data.preprocessing.steps import (
        ReadDocuments,
        TokenizeDocuments,
        TokenizeShard,
    )

    options, workspace = job.options, job.workspace
    report.shards = len(job.shards)
    report.shards_kept = _trust_finished(job)
    errors = workspace.folder / "errors"
    for path in errors.glob("*"):
        path.unlink()
    try:
        with watched(job, report.shards_kept):
            if not options.stages:
                pipeline: list[Any] = [TokenizeShard(job)]
            else:
                plan = plan_stages(job, lambda: [ReadDocuments(job)])
                for phase in plan.phases:
                    where = workspace.folder / phase.name
                    make_executor(options, phase.steps(), phase.tasks, where).run()
                    _raise_reported(errors)
                reader = ReadDocuments(job)
                pipeline = [reader, *plan.filters(), TokenizeDocuments(job, reader)]
            make_executor(options, pipeline, len(job.shards), workspace.folder).run()
    except BaseException as error:
        if active_job(workspace.folder) is None:
            _clean_up(job)
        release_claims()
        if mistake := cannot_write(options.output_prefix, error):
            raise mistake from error
        raise
    try:
        _raise_reported(errors)
    except BaseException:
        release_claims()
        raise
    if options.stages:
        report.stages = stage_counts(workspace.folder / "stats", len(job.shards), options.stages)


def _trust_finished(job: Job) -> int:
    """Has shards done again whose files are no longer what their record says; counts the rest."""
    kept = 0
    for shard in job.shards:
        record = job.workspace.read_record(shard.number)
        if record is None or not all(_is_there(job, shard.number, e) for e in record["datasets"]):
            job.workspace.forget(shard.number)
        else:
            kept += 1
    return kept


def _is_there(job: Job, shard: int, entry: dict[str, Any]) -> bool:
    prefix = job.dataset_prefix(shard, entry["split"])
    sizes = {bin_path(prefix): entry["bin_bytes"], idx_path(prefix): entry["idx_bytes"]}
    return all(path.exists() and path.stat().st_size == size for path, size in sizes.items())


def _raise_reported(errors: Path) -> None:
    """Raises what went wrong in a task on another machine."""
    found = sorted(errors.glob("*")) if errors.exists() else []
    for path in found:
        text = path.read_text(encoding="utf-8")
        if path.name.startswith("mistake_"):
            raise UserError(text)
        raise RuntimeError(f"task {path.name.split('_')[1]} failed:\n{text}")


def _clean_up(job: Job) -> None:
    """After a failure: half-written files go, finished shards stay for the next attempt."""
    for shard in job.shards:
        for split in job.splits:
            prefix = Path(job.dataset_prefix(shard.number, split))
            for ending in ("bin", "idx", "lengths"):
                prefix.with_name(f".{prefix.name}.{ending}.partial").unlink(missing_ok=True)
    if not _finished_shards(job.workspace, len(job.shards)):
        job.workspace.remove()


def stage_counts(stats: Path, tasks: int, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each stage, in order: documents in and out, and why the others went.

    The statistics have a step before the stages, which reads, and one after them, which tokenizes.
    """
    totals: list[dict[str, Any]] = [{"name": stage["name"], "counts": {}} for stage in stages]
    for task in range(tasks):
        steps = json.loads((stats / f"{task:05d}.json").read_text(encoding="utf-8"))
        for entry, step in zip(totals, steps[1:-1], strict=True):
            counts = entry["counts"]
            for name, value in step["stats"].items():
                if name in ("total", "forwarded", "dropped") or name.startswith("dropped_"):
                    count = value["total"] if isinstance(value, dict) else value
                    counts[name] = counts.get(name, 0) + count
    return totals
