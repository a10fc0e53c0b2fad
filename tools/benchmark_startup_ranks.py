"""Measures what a run's start and its first save cost as ranks are added.

    python tools/benchmark_startup_ranks.py --processes 2 4 8 16

All processes are on this machine, over gloo, each with one pipeline stage of two and its part of
the data-parallel ranks; imports are over before the clock starts. The model is a toy, so what is
seen is the cost of coordination. Times are of the slowest rank; what the processor did for all of
them together is said too, because on few cores that is what a wall time shows.
"""

import argparse
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    if arguments.rank_in:
        _be_a_rank(arguments.rank_in, arguments.datasets)
        return
    print(f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}", flush=True)
    for count in arguments.processes:
        rounds = [_measure(count, arguments.datasets) for _ in range(arguments.repeat)]
        best = {name: min(times[name] for times in rounds) for name in rounds[0]}
        figures = ", ".join(f"{name} {value:.3f}" for name, value in best.items())
        print(f"{count:3d} processes: {figures}", flush=True)


def _parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--datasets", type=int, default=200, help="sources of the blend")
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many is taken")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    odd = [count for count in arguments.processes if count < 2 or count % 2]
    if odd:
        raise UserError(f"--processes {odd[0]}: give even numbers, for two pipeline stages")
    return arguments


def _measure(count: int, datasets: int) -> dict[str, float]:
    """Seconds of each phase, of the slowest of ``count`` ranks; bytes of the checkpoint's metadata.

    Raises:
        UserError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_datasets(folder, datasets)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--datasets", str(datasets), "--rank-in", name]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **world, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(count)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise UserError(f"a rank of {count} failed: see above")
        times = [json.loads(path.read_text()) for path in folder.glob("*.json")]
        metadata = sum(path.stat().st_size for path in folder.glob("run/checkpoints/*/.metadata"))
    slowest = {name: max(time[name] for time in times) for name in times[0] if name != "processor"}
    processor = sum(time["processor"] for time in times)
    return {**slowest, "processor": processor, "metadata kB": metadata / 1000}


def _write_datasets(folder: Path, count: int) -> None:
    import numpy as np

    from samba_megatron.data.indexed import IndexedWriter

    for number in range(count):
        with IndexedWriter(str(folder / f"source_{number:05d}"), np.uint16) as writer:
            for document in range(10):
                writer.add_document(np.full(100 + document, 1 + number % 250, np.uint16))
            writer.finish()


class _Phases:
    """Times of what every rank does, from when all are there until the last is done with it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs ``work`` and notes its seconds."""
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result


def _be_a_rank(folder: Path, datasets: int) -> None:
    """Goes through a start, a save and a second start, and writes the times."""
    from samba_megatron.platform import cpu_shim, distributed, noise

    with noise.quiet_imports():
        cpu_shim.install()
        noise.import_megatron()
    import torch

    from samba_megatron.training import loop, setup  # noqa: F401 (imports are not what is timed)

    rank, count = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    config = _config(folder, datasets, count)
    (folder / f"{rank}.ready").touch()
    while len(list(folder.glob("*.ready"))) < count:
        time.sleep(0.01)
    phases, before = _Phases(), _processor_seconds()
    phases.time("rendezvous", lambda: torch.distributed.init_process_group("gloo"))
    place = phases.time("groups", lambda: distributed.initialize(config.parallel))
    phases.time("first all-reduce", lambda: torch.distributed.all_reduce(torch.ones(1)))
    _start_and_save(config, place, phases)
    phases.seconds["processor"] = _processor_seconds() - before
    (folder / f"{rank}.json").write_text(json.dumps(phases.seconds))
    distributed.shutdown()


def _start_and_save(config: Any, place: Any, phases: _Phases) -> None:
    """A cold start, a save, and the start that resumes from it."""
    import torch

    from samba_megatron.training.setup import set_up

    cold: dict[str, float] = {}
    run = set_up(config, place, cold)
    phases.seconds["data index, cold"] = cold["data"]
    phases.seconds["model"] = cold["model"]
    run.state.progress.step = 1
    torch.distributed.barrier()
    phases.time("save", lambda: run.store.save(run.state, blocking=True))
    run.store.close()
    torch.distributed.barrier()
    warm: dict[str, float] = {}
    run = set_up(config, place, warm)
    assert run.state.progress.step == 1, "the second start did not resume"
    phases.seconds["data index, warm"] = warm["data"]
    phases.seconds["load"] = warm["checkpoint"]
    run.store.close()


def _config(folder: Path, datasets: int, count: int) -> Any:
    from samba_megatron.training.entry import resolve_paths
    from tests.distributed.run_layouts import configure
    from tests.distributed.toy import toy_config

    fields = toy_config("", folder / "run")
    fields["data.data_path"] = [str(folder / f"source_{n:05d}") for n in range(datasets)]
    fields["parallel.pipeline_model_parallel_size"] = 2
    fields["training.global_batch_size"] = 8 * count
    return resolve_paths(configure(fields))


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    run_command(main)
