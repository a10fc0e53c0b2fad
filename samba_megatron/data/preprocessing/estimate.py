"""What a run would do and how long it would take, from a sample: ``--dry-run``."""

import time
from pathlib import Path

from samba_megatron.data.indexed import token_dtype
from samba_megatron.data.preprocessing.encoding import BatchTokenizer, Engine
from samba_megatron.data.preprocessing.inputs import find_inputs
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.progress import in_words
from samba_megatron.data.preprocessing.readers import PieceReader
from samba_megatron.data.preprocessing.run import settle_engine
from samba_megatron.data.preprocessing.shards import Shard, plan_shards
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_PART = 100
"""One part in so many is read and tokenized."""
_AT_MOST_S = 60.0
_POINTS = 50
"""Places over the inputs at which the sample is taken."""
_POINT_BYTES = 1 << 20
"""Taken at each, at least."""
_START_S = 2.0
"""Imports and the comparison of the engines."""


def estimate(options: PreprocessOptions) -> dict[str, str]:
    """Rows for a table: inputs, shards, engine, and the size and time that a sample suggests.

    Raises:
        UserError: as :func:`.run.preprocess`, for what can be found without reading everything.
    """
    options.check()
    files, passed_over = find_inputs(options.inputs)
    tokenizer = load_tokenizer(options.tokenizer)
    shards = plan_shards(files, options.shard_bytes)
    warnings: list[str] = []
    engine = settle_engine(options, tokenizer, shards, warnings)
    found = _measure(options, tokenizer, engine, shards)
    factor = sum(file.size for file in files) / max(found["raw"], 1)
    tokens = found["tokens"] * factor
    lanes = min(options.workers, len(shards)) if len(shards) > 1 else 1
    entry_bytes = tokens * token_dtype(tokenizer.vocab_size).itemsize
    rows = {
        "inputs": f"{len(files):,} files, {sum(file.size for file in files) / 1e6:,.1f} MB",
        "shards": f"{len(shards):,}",
        "workers": f"{options.workers:,}" + (" Slurm jobs" if options.slurm else ""),
        "engine": str(engine),
        "sample": f"{found['raw'] / 1e6:,.1f} MB, {found['documents']:,.0f} documents",
        "documents, about": f"{found['documents'] * factor:,.0f}",
        "tokens, about": f"{tokens:,.0f}",
        "output, about": f"{(entry_bytes + found['documents'] * factor * 20) / 1e6:,.1f} MB",
        "time, about": in_words(_START_S + found["seconds"] * factor / lanes),
    }
    if found["skipped"]:
        rows["unusable places in the sample"] = f"{found['skipped']:,.0f}"
    if passed_over:
        rows["files of other kinds, not read"] = f"{len(passed_over):,}"
    if options.stages:
        rows["stages (not in the estimate)"] = ", ".join(s["name"] for s in options.stages)
    if Path(f"{options.output_prefix}.preprocess").exists():
        rows["an unfinished run"] = "is there and would be gone on with"
    return rows | {f"warning {n}": text for n, text in enumerate(warnings, 1)}


def _measure(
    options: PreprocessOptions, tokenizer: Tokenizer, engine: Engine, shards: list[Shard]
) -> dict[str, float]:
    """Reads and tokenizes one part in a hundred, taken at places spread over all inputs."""
    encode = BatchTokenizer(tokenizer, engine, options.append_eod)
    found = dict.fromkeys(("raw", "documents", "tokens", "skipped", "seconds"), 0.0)
    pieces = [piece for shard in shards for piece in shard.pieces]
    wanted = sum(piece.raw_bytes for piece in pieces) / _PART
    points = int(max(1, min(_POINTS, len(pieces), wanted // _POINT_BYTES)))
    chosen = pieces[:: -(-len(pieces) // points)]
    for piece in chosen:
        started = time.perf_counter()
        reader = PieceReader(piece, options.text_key, batch_bytes=_POINT_BYTES)
        for batch in reader:
            found["tokens"] += len(encode(batch.texts).tokens)
            found["documents"] += len(batch.texts)
            found["skipped"] += len(batch.issues)
            if reader.raw_bytes >= wanted / len(chosen):
                break
        found["raw"] += max(reader.raw_bytes, 1)
        found["seconds"] += time.perf_counter() - started
        if found["seconds"] > _AT_MOST_S:
            break
    if not found["documents"]:
        raise UserError("the sample holds no usable document: check --text-key and the inputs")
    return found
