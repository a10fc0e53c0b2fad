"""Times the start-up of a run's data with thousands of datasets, beside megatron's own.

Each figure is of a process of its own: time to build the samples and read some, growth of resident
memory, open files and mappings. "cold" has an empty index cache (the files themselves are in the
page cache either way), "warm" the one that the cold start left.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from samba_megatron.platform.errors import UserError, run_command

_WAYS = ("ours", "megatron")


def main() -> None:
    """Runs the command."""
    arguments = _arguments()
    if arguments.measure:
        _measure(arguments)
        return
    if min(arguments.datasets, arguments.documents, arguments.samples) < 1:
        raise UserError("--datasets, --documents and --samples must be 1 or more")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        tokens = _make_datasets(folder, arguments.datasets, arguments.documents)
        rows = {}
        for way in _WAYS:
            for start in ("cold", "warm"):
                print(f"{way}, {start} …", file=sys.stderr, flush=True)
                rows[f"{way}, {start}"] = _in_process(arguments, folder, way)
    _print(arguments, tokens, rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--datasets", type=int, default=2000, help="how many (default: 2000)")
    add("--documents", type=int, default=500, help="in each (default: 500)")
    add("--samples", type=int, default=100_000, help="of the run (default: 100000)")
    add("--sequence-length", type=int, default=2048, help="tokens of a sample (default: 2048)")
    add("--folder", type=Path, help="where to make the datasets (default: the system's)")
    add("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _make_datasets(folder: Path, datasets: int, documents: int) -> int:
    """Datasets of different sizes, with lengths as web documents have; returns all tokens."""
    import numpy as np

    from samba_megatron.data.indexed import IndexedWriter

    generator = np.random.default_rng(1)
    total = 0
    for number in range(datasets):
        lengths = np.minimum(generator.lognormal(6.2, 1.0, documents), 60_000).astype(np.int32) + 1
        with IndexedWriter(folder / f"d{number:05d}", np.uint16) as writer:
            writer.add(generator.integers(0, 32_000, lengths.sum(), np.uint16), lengths)
            total += writer.finish().tokens
        if number % 100 == 99:
            print(f"{number + 1} of {datasets} datasets made", file=sys.stderr, flush=True)
    return total


def _in_process(arguments: argparse.Namespace, folder: Path, way: str) -> dict[str, Any]:
    result = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", __file__, "--measure", way, str(folder)),
            *("--samples", str(arguments.samples)),
            *("--sequence-length", str(arguments.sequence_length)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    if result.returncode:
        return {"failed": result.stdout.strip().splitlines()[-1:] or ["see above"]}
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _measure(arguments: argparse.Namespace) -> None:
    """One start in this process; prints its figures as JSON."""
    way, folder = arguments.measure[0], Path(arguments.measure[1])
    prefixes = sorted(str(path)[:-4] for path in folder.glob("d*.idx"))
    if way == "megatron":
        # It keeps over 2,000 files open, more than many machines allow by default.
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        from megatron.core.datasets import helpers  # noqa: F401
    import torch  # noqa: F401

    from samba_megatron.data import datasets  # noqa: F401

    memory = _resident_mb()
    start = time.perf_counter()
    build = _build_ours if way == "ours" else _build_megatrons
    dataset = build(prefixes, folder, arguments.samples, arguments.sequence_length)
    built = time.perf_counter()
    first = [dataset[index] for index in range(min(256, arguments.samples))]
    read = time.perf_counter()
    print(
        json.dumps(
            {
                "build, s": round(built - start, 2),
                "first 256 samples, s": round(read - built, 2),
                "memory, MB": round(_resident_mb() - memory),
                "open files": len(os.listdir("/proc/self/fd")),
                "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
                "files in the cache": sum(1 for _ in (folder / way).rglob("*.*")),
                "samples": len(first),
            }
        )
    )


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _build_ours(prefixes: list[str], folder: Path, samples: int, length: int) -> Any:
    from samba_megatron.config.data import DataConfig
    from samba_megatron.data.datasets import build_train_and_valid

    cache = str(folder / "ours")
    data = DataConfig(prefixes, split="1", sequence_length=length, path_to_cache=cache)
    return build_train_and_valid(data, samples, 0, 1234, vocab_size=32_000)[0]


def _build_megatrons(prefixes: list[str], folder: Path, samples: int, length: int) -> Any:
    from types import SimpleNamespace

    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    weights = [float(os.path.getsize(f"{prefix}.bin")) for prefix in prefixes]
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=length,
        blend=(prefixes, weights),
        split="1,0,0",
        path_to_cache=str(folder / "megatron"),
        tokenizer=SimpleNamespace(eod=0, vocab_size=32_000, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    config.split_matrix = [(0.0, 1.0), None, None]
    sizes = [samples, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def _print(arguments: argparse.Namespace, tokens: int, rows: dict[str, dict[str, Any]]) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    title = (
        f"{arguments.datasets:,} datasets, {tokens / 1e9:.2f}B tokens, {arguments.samples:,} "
        f"samples of {arguments.sequence_length}"
    )
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for way, row in rows.items():
        table.add_row(way, *(str(row.get(name, "")) for name in names))
    Console(width=130).print(table)
    print(
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, megatron-core {version('megatron-core')}, torch "
        f"{version('torch')}; {limit:,} open files allowed"
    )


if __name__ == "__main__":
    run_command(main)
