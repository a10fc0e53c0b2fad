"""Turns corpora of JSON lines into an indexed dataset, in parallel and in bounded memory.

One process reads, hashes and writes; workers tokenize blocks of lines. Results are taken in the
order of the input, so the output is the same for every number of workers. Nothing appears under
the output's name until all of it is there.
"""

import multiprocessing
import os
import platform
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from samba_megatron import __version__
from samba_megatron.data.encoding import (
    BlockTokenizer,
    Engine,
    SampleDocument,
    TokenizedBlock,
    choose_engine,
)
from samba_megatron.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from samba_megatron.data.jsonl import (
    Defect,
    HashingReader,
    expand_inputs,
    open_input,
    parse_block,
    read_blocks,
)
from samba_megatron.data.manifest import (
    InputFile,
    Manifest,
    is_up_to_date,
    manifest_path,
    write_manifest,
)
from samba_megatron.data.throughput import ThroughputDisplay
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_BLOCK_BYTES = 4 << 20
_BLOCKS_AHEAD = 2
"""Blocks a worker may have waiting: bounds the memory, keeps every worker busy."""

_WORTH_A_WORKER = {Engine.GIGATOKEN: 256 << 20, Engine.HUGGINGFACE: 4 << 20}
"""Input bytes that take well longer to tokenize than it takes to start another worker (1-2 s)."""

_SAMPLE_FILES = 8
_SAMPLE_BYTES = 1 << 20
_SAMPLE_DOCUMENT_BYTES = 1 << 18
_EXAMPLES = 10

_REMEDIES = {
    Defect.MALFORMED: "mend the line",
    Defect.NOT_OBJECT: "each line must be a JSON object with the text under a key",
    Defect.MISSING_KEY: "name the key that holds the text with --text-key",
    Defect.NOT_STRING: "name the key that holds the text with --text-key",
    Defect.NOT_UNICODE: "mend the line",
    Defect.EMPTY: "remove the line",
}


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read, how, and where the dataset goes."""

    inputs: list[str]
    """Files or globs: JSON lines, plain, ``.gz`` or ``.zst``."""
    tokenizer: str
    """Folder of the tokenizer."""
    output_prefix: str
    """The dataset's ``.bin``, ``.idx`` and ``.manifest.json`` get this path."""
    workers: int = 1
    """Processes that tokenize, at most: inputs too small to be worth it start fewer, or none."""
    text_key: str = "text"
    """The key of each object that holds the text."""
    append_eod: bool = True
    """End each document with the tokenizer's EOS."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a line without a usable document does."""
    engine: Literal["auto", "huggingface"] = "auto"
    """``auto`` uses gigatoken where it gives Hugging Face's tokens."""
    overwrite: bool = False
    """Replace a dataset that was made from something else."""

    def deciding(self) -> dict[str, Any]:
        """The options that the output depends on."""
        return {
            "text_key": self.text_key,
            "append_eod": self.append_eod,
            "on_error": self.on_error,
        }


@dataclass
class PreprocessReport:
    """What came of it."""

    prefix: str
    up_to_date: bool = False
    """The dataset was there already: nothing was done, the counts below are zero."""
    engine: Engine = Engine.HUGGINGFACE
    warnings: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    read_bytes: int = 0
    """Bytes of JSON lines, decompressed."""
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    lines: int = 0
    blank_lines: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Lines without a usable document, by reason."""
    skipped_examples: list[str] = field(default_factory=list)
    """The first few of them, as file:line: reason."""
    seconds: float = 0.0


@dataclass
class _Input:
    """An input that is being read."""

    path: Path
    size: int
    mtime_ns: int
    lines_done: int = 0
    sha256: str = ""


@dataclass
class _Block:
    """Lines on their way to a worker, and how far into all inputs they end."""

    source: _Input
    data: bytes
    raw_bytes_done: int


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Makes the dataset that ``options`` describe, unless it is there already.

    Raises:
        UserError: an input, the tokenizer or a line is unusable, or the prefix holds a dataset
            made from something else; the message names it and the remedy.
    """
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least 1 is needed")
    inputs = [_inspect(path) for path in expand_inputs(options.inputs)]
    tokenizer = load_tokenizer(options.tokenizer)
    prefix = options.output_prefix
    paths = [source.path for source in inputs]
    described = _describe(tokenizer)
    if is_up_to_date(prefix, paths, described, options.deciding(), options.overwrite):
        return PreprocessReport(prefix, up_to_date=True)

    started = time.monotonic()
    report = PreprocessReport(prefix)
    report.engine = _settle_engine(options, tokenizer, paths, report.warnings)
    with IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer:
        _write_documents(options, report, inputs, writer)
        if writer.documents == 0:
            raise UserError(f"the inputs hold no documents, {prefix} was not written")
        manifest_path(prefix).unlink(missing_ok=True)
        writer.finish()
    report.seconds = time.monotonic() - started
    write_manifest(prefix, _manifest(options, report, inputs, described, writer.max_token_id))
    return report


def _inspect(path: Path) -> _Input:
    with open_input(path) as raw:
        status = os.fstat(raw.fileno())
    return _Input(path, status.st_size, status.st_mtime_ns)


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "identity": tokenizer.identity,
        "eod": tokenizer.eod,
        "vocab_size": tokenizer.vocab_size,
    }


def _settle_engine(
    options: PreprocessOptions, tokenizer: Tokenizer, paths: list[Path], warnings: list[str]
) -> Engine:
    """The engine to use; a fallback leaves a warning."""
    if options.engine == "huggingface":
        return Engine.HUGGINGFACE
    engine, reason = choose_engine(tokenizer, _sample(paths, options.text_key))
    if reason:
        warnings.append(f"{reason}: Hugging Face tokenizers are used instead, many times slower")
    return engine


def _sample(paths: list[Path], text_key: str) -> Iterator[SampleDocument]:
    """Documents from the starts of files spread over the inputs, about 1 MB in all."""
    step = -(-len(paths) // _SAMPLE_FILES)
    chosen = paths[::step]
    share = _SAMPLE_BYTES // len(chosen)
    for path in chosen:
        taken = 0
        with open_input(path) as raw:
            block = next(read_blocks(path, HashingReader(raw), share), b"")
        parsed = parse_block(block, text_key)
        for line, text in zip(parsed.text_lines, parsed.texts, strict=True):
            if taken < share and len(text) <= _SAMPLE_DOCUMENT_BYTES:
                taken += len(text)
                yield SampleDocument(f"{path}:{line}", text)


def _write_documents(
    options: PreprocessOptions,
    report: PreprocessReport,
    inputs: list[_Input],
    writer: IndexedWriter,
) -> None:
    """Runs every block of every input through the workers into ``writer``."""
    total = sum(source.size for source in inputs)
    workers = min(options.workers, 1 + total // _WORTH_A_WORKER[report.engine])
    with ThroughputDisplay(total) as display:
        for block, result in _tokenized(options, report.engine, workers, _blocks(inputs)):
            _account(options, report, block, result)
            writer.add(result.tokens, result.lengths)
            report.documents, report.tokens = writer.documents, writer.tokens
            display.update(block.raw_bytes_done, report.read_bytes, report.documents, report.tokens)


def _blocks(inputs: list[_Input]) -> Iterator[_Block]:
    """All blocks of all inputs in order; notes each input's hash once it is read through."""
    before = 0
    for source in inputs:
        with open_input(source.path) as raw:
            reader = HashingReader(raw)
            for data in read_blocks(source.path, reader, _BLOCK_BYTES):
                yield _Block(source, data, before + reader.bytes_read)
            source.sha256 = reader.hexdigest()
            if reader.bytes_read != source.size:
                raise UserError(f"{source.path} changed while it was read: run again")
            before += reader.bytes_read


def _tokenized(
    options: PreprocessOptions, engine: Engine, workers: int, blocks: Iterator[_Block]
) -> Iterator[tuple[_Block, TokenizedBlock]]:
    """Yields each block with its tokens, in order, a bounded number of blocks ahead."""
    arguments = (options.tokenizer, engine, options.text_key, options.append_eod)
    if workers == 1:
        tokenize = _block_tokenizer(*arguments)
        for block in blocks:
            yield block, tokenize(block.data)
        return
    # Fresh interpreters: the threads of the tokenizers' libraries do not survive a fork.
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, arguments
    )
    waiting: deque[tuple[_Block, Future[TokenizedBlock]]] = deque()
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_tokenize_in_worker, block.data)))
            block.data = b""
            if len(waiting) > workers * _BLOCKS_AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenizing worker died, most likely killed for lack of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _block_tokenizer(
    tokenizer: str, engine: Engine, text_key: str, append_eod: bool
) -> BlockTokenizer:
    return BlockTokenizer(load_tokenizer(tokenizer), engine, text_key, append_eod)


_worker: BlockTokenizer | None = None
"""The tokenizer of this worker process."""


def _start_worker(tokenizer: str, engine: Engine, text_key: str, append_eod: bool) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _block_tokenizer(tokenizer, engine, text_key, append_eod)


def _tokenize_in_worker(block: bytes) -> TokenizedBlock:
    assert _worker is not None
    return _worker(block)


def _account(
    options: PreprocessOptions, report: PreprocessReport, block: _Block, result: TokenizedBlock
) -> None:
    """Adds a block to the report; stops at an unusable line or where the engines differ."""
    source = block.source
    for issue in result.issues:
        place = f"{source.path}:{source.lines_done + issue.line}: {issue.defect}"
        if options.on_error == "fail":
            raise UserError(
                f"{place}: {_REMEDIES[issue.defect]}, or pass over such lines with --on-error skip"
            )
        report.skipped[issue.defect] += 1
        if len(report.skipped_examples) < _EXAMPLES:
            report.skipped_examples.append(place)
    if result.disagreement is not None:
        raise UserError(
            f"gigatoken gives other tokens than Hugging Face for {source.path}:"
            f"{source.lines_done + result.disagreement}: run again with --engine huggingface"
        )
    source.lines_done += result.lines
    report.lines += result.lines
    report.blank_lines += result.blank_lines
    report.text_bytes += result.text_bytes
    report.read_bytes += result.block_bytes


def _manifest(
    options: PreprocessOptions,
    report: PreprocessReport,
    inputs: list[_Input],
    tokenizer: dict[str, Any],
    max_token_id: int,
) -> Manifest:
    prefix = report.prefix
    return Manifest(
        inputs=[
            InputFile(str(source.path.absolute()), source.size, source.mtime_ns, source.sha256)
            for source in inputs
        ],
        tokenizer=tokenizer,
        options=options.deciding(),
        counts={
            "documents": report.documents,
            "tokens": report.tokens,
            "text_bytes": report.text_bytes,
            "lines": report.lines,
            "blank_lines": report.blank_lines,
            "skipped": dict(report.skipped),
            "skipped_examples": report.skipped_examples,
        },
        output={
            "dtype": str(token_dtype(tokenizer["vocab_size"])),
            "bin_bytes": os.path.getsize(bin_path(prefix)),
            "idx_bytes": os.path.getsize(idx_path(prefix)),
            "max_token_id": max_token_id,
        },
        made_by={
            "samba_megatron": __version__,
            "tokenizers": version("tokenizers"),
            "gigatoken": version("gigatoken"),
            "python": platform.python_version(),
            "engine": str(report.engine),
            "tokenizer_path": str(Path(options.tokenizer).absolute()),
            "workers": options.workers,
            "seconds": round(report.seconds, 3),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
