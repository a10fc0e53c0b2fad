"""Measures preprocessing on this machine, side by side, on text made from Python's own sources.

Compared are: Megatron-LM's algorithm (Hugging Face tokenizers, one JSON line at a time, one
writer), gigatoken's own encode_files on the same file (tokens in memory, nothing written), and
tools/preprocess_corpus.py on JSON lines, .zst, .gz and parquet, each in processes of its own. Cores
that others use slow all of them: compare figures of one run only.
"""

import argparse
import functools
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from samba_megatron.data.corpus import gather_corpus
from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from samba_megatron.platform.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[1]
VARIED_LINES = 10
"""One line in so many has its letters exchanged, differently in each repetition."""
FORMATS = ("jsonl", "zst", "gz", "parquet")
Row = tuple[str, float, float, float, float | None]
"""What ran, MB of JSON lines, seconds, seconds of CPU, and the peak of resident memory in MB."""


def main() -> None:
    """Runs the command."""
    arguments = _parse_arguments()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = prepare(folder, arguments.megabytes, arguments.vocab_size)
    corpus = folder / f"text-{arguments.megabytes}.jsonl"
    rows: list[Row] = []
    for _ in range(arguments.repeat):
        rows += _measure_all(arguments, folder, tokenizer, corpus)
    _report(_best(rows), arguments)


def _best(rows: list[Row]) -> list[Row]:
    """Of each measurement the fastest repetition; the most memory of all."""
    best: dict[str, Row] = {}
    for row in rows:
        kept = best.get(row[0], row)
        memory = None if row[4] is None else max(row[4], kept[4] or 0.0)
        best[row[0]] = (*min(row, kept, key=lambda r: r[2])[:4], memory)
    return list(best.values())


def _measure_all(
    arguments: argparse.Namespace, folder: Path, tokenizer: Path, corpus: Path
) -> list[Row]:
    rows: list[Row] = []
    if "megatron" in arguments.measure:
        small = folder / "text-32.jsonl"
        _write_corpus(folder / "corpus" / "train.jsonl", small, 32)
        rows.append(
            _timed("Megatron-LM's algorithm", small, _megatron(small, tokenizer, arguments))
        )
    if "encode_files" in arguments.measure:
        rows.append(_measured("gigatoken encode_files", corpus, _encode_files(corpus, tokenizer)))
    for name in arguments.measure:
        if name in FORMATS:
            packed = _packed(corpus, name)
            command = _ours(packed, tokenizer, folder / "out" / name, arguments.workers)
            rows.append(_measured(f"preprocess_corpus, {name}", corpus, command))
    return rows


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("benchmark"), help="(benchmark)")
    parser.add_argument("--megabytes", type=int, default=1000, help="JSON lines to make (1000)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--vocab-size", type=int, default=32000, help="(32000)")
    parser.add_argument("--repeat", type=int, default=1, help="rounds; the fastest counts (1)")
    choices = ("megatron", "encode_files", *FORMATS)
    parser.add_argument(
        "--measure", nargs="+", choices=choices, default=list(choices), help="(all)"
    )
    arguments = parser.parse_args()
    if arguments.megabytes < 32:
        raise UserError("--megabytes must be at least 32: less measures the start alone")
    return arguments


def prepare(folder: Path, megabytes: int, vocab_size: int) -> Path:
    """Makes the text and the tokenizer, unless they are there; returns the tokenizer's folder."""
    source, tokenizer = folder / "corpus" / "train.jsonl", folder / f"tokenizer-{vocab_size}"
    if not source.exists():
        gather_corpus(folder / "corpus")
    if not tokenizer.exists():
        train_tokenizer(read_texts([source], "text"), vocab_size, tokenizer)
    _write_corpus(source, folder / f"text-{megabytes}.jsonl", megabytes)
    return tokenizer


def _write_corpus(source: Path, target: Path, megabytes: int) -> None:
    """Repeats the source's documents, each time with other letters in one line of ten."""
    if target.exists():
        return
    texts = list(read_texts([source], "text"))
    partial, left = target.with_suffix(".partial"), megabytes * 10**6
    with open(partial, "w", encoding="utf-8") as stream:
        for text in _repeated(texts):
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            left -= stream.write(line)
            if left < 0:
                break
    partial.replace(target)


def _repeated(texts: list[str]) -> Iterator[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    repetition = 0
    while True:
        turned = letters[repetition % 26 :] + letters[: repetition % 26]
        swap = str.maketrans(letters[repetition % 7 :: 7], turned[repetition % 7 :: 7])
        for text in texts:
            lines = text.split("\n")
            for number in range(repetition % VARIED_LINES, len(lines), VARIED_LINES):
                lines[number] = lines[number].translate(swap)
            yield "\n".join(lines)
        repetition += 1


def _packed(corpus: Path, form: str) -> Path:
    """The corpus in another format, made if it is not there."""
    target = corpus if form == "jsonl" else corpus.with_suffix(f".jsonl.{form}")
    if form == "parquet":
        target = corpus.with_suffix(".parquet")
    if target.exists():
        return target
    partial = target.with_suffix(".partial")
    if form == "parquet":
        _write_parquet(corpus, partial)
    else:
        with open(corpus, "rb") as source, _packing(partial, form) as stream:
            while chunk := source.read(1 << 22):
                stream.write(chunk)
    partial.replace(target)
    return target


def _packing(path: Path, form: str):  # type: ignore[no-untyped-def]
    if form == "gz":
        import gzip

        return gzip.open(path, "wb", compresslevel=6)
    import zstandard

    return zstandard.open(path, "wb", cctx=zstandard.ZstdCompressor(level=3))


def _write_parquet(corpus: Path, target: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    texts: list[str] = []
    with parquet.ParquetWriter(target, schema, compression="zstd") as writer:
        for text in read_texts([corpus], "text"):
            texts.append(text)
            if len(texts) == 1000:
                writer.write_table(pyarrow.table({"text": texts}, schema))
                texts = []
        writer.write_table(pyarrow.table({"text": texts}, schema))


_encode: Callable[[str], list[int]]


def _start_megatron_worker(tokenizer: Path) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    loaded = load_tokenizer(tokenizer)
    _encode = functools.partial(_with_eod, loaded)


def _with_eod(tokenizer, text: str) -> list[int]:  # type: ignore[no-untyped-def]
    return [*tokenizer.encode(text), tokenizer.eod]


def _megatron_line(line: str) -> list[int]:
    return _encode(json.loads(line)["text"])


def _megatron(corpus: Path, tokenizer: Path, arguments: argparse.Namespace) -> Callable[[], None]:
    """One line at a time to a pool of processes, and each document to Megatron's own builder."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def run() -> None:
        target = corpus.parent / "megatron"
        builder = IndexedDatasetBuilder(f"{target}.bin", dtype=np.uint16)
        initial = (_start_megatron_worker, (tokenizer,))
        with multiprocessing.Pool(arguments.workers, *initial) as pool, open(corpus) as lines:
            for ids in pool.imap(_megatron_line, lines, 32):
                builder.add_document(torch.IntTensor(ids), [len(ids)])
        builder.finalize(f"{target}.idx")

    return run


def _encode_files(corpus: Path, tokenizer: Path) -> list[str]:
    code = (
        "import time, gigatoken\n"
        f"tokenizer = gigatoken.Tokenizer({str(tokenizer)!r})\n"
        f"source = gigatoken.JsonlFileSource([{str(corpus)!r}])\n"
        "started = time.perf_counter()\n"
        "tokenizer.encode_files(source)\n"
        "print('SECONDS', time.perf_counter() - started)\n"
    )
    return [sys.executable, "-c", code]


def _ours(corpus: Path, tokenizer: Path, prefix: Path, workers: int) -> list[str]:
    for path in [*prefix.parent.glob(f"{prefix.name}.*"), *prefix.parent.glob(f"{prefix.name}_*")]:
        if path.is_file():
            path.unlink()
    command = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(corpus)]
    command += ["--tokenizer", str(tokenizer), "--output-prefix", str(prefix)]
    return [*command, "--workers", str(workers)]


def _timed(name: str, corpus: Path, run: Callable[[], None]) -> Row:
    started, cpu = time.perf_counter(), _cpu_seconds()
    run()
    seconds = time.perf_counter() - started
    return name, corpus.stat().st_size / 1e6, seconds, _cpu_seconds() - cpu, None


def _cpu_seconds() -> float:
    """CPU time of this process and of all that it has started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _measured(name: str, corpus: Path, command: list[str]) -> Row:
    """Runs a command; wall time from start to end, or what it says itself."""
    started, cpu = time.perf_counter(), _cpu_seconds()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = _Peak(process.pid)
    output, _ = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{name} failed with exit code {process.returncode}")
    for line in output.splitlines():
        if line.startswith("SECONDS "):
            seconds = float(line.split()[1])
    memory = peak.megabytes()
    return name, corpus.stat().st_size / 1e6, seconds, _cpu_seconds() - cpu, memory


class _Peak:
    """The most memory that a process and all below it have held together."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._root = psutil.Process(pid)
        self._gone = psutil.Error
        self._largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            try:
                family = [self._root, *self._root.children(recursive=True)]
                # What is shared by forked processes counts once.
                total = sum(p.memory_full_info().pss for p in family)
            except self._gone:
                continue
            self._largest = max(self._largest, total)

    def megabytes(self) -> float:
        """Stops watching."""
        self._stop.set()
        self._thread.join()
        return self._largest / 1e6


def _report(rows: list[Row], arguments: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("gigatoken", "tokenizers"))
    print(f"{platform.processor() or platform.machine()}, {arguments.workers} workers, {versions}")
    table = Table("what", "MB", "s", "MB/s", "of the first", "CPU s a GB", "peak MB")
    first = rows[0][1] / rows[0][2]
    for name, megabytes, seconds, cpu, peak in rows:
        rate = megabytes / seconds
        shown = "" if peak is None else f"{peak:,.0f}"
        cells = [f"{megabytes:,.0f}", f"{seconds:.2f}", f"{rate:.1f}", f"{rate / first:.2f}"]
        table.add_row(name, *cells, f"{1000 * cpu / megabytes:.1f}", shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    run_command(main)
