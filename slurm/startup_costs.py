"""Measures what a start costs as ranks are added: rendezvous, process groups, first collectives.

    python slurm/startup_costs.py --processes 2 4 8 16

All processes are on this machine, over gloo; imports are over before the clock starts. The times
are of the slowest rank.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--repeat", type=int, default=3, help="the best of so many is taken")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_in:
        be_a_rank(arguments.rank_in)
        return
    for count in arguments.processes:
        rounds = [measure(count) for _ in range(arguments.repeat)]
        best = {name: min(times[name] for times in rounds) for name in rounds[0]}
        figures = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in best.items())
        print(f"{count:3d} processes: {figures}", flush=True)


def measure(count: int) -> dict[str, float]:
    """Seconds of each phase, of the slowest of ``count`` ranks.

    Raises:
        UserError: a rank failed.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        world |= {"MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        free.close()
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-in", folder],
                env={**os.environ, **world, "RANK": str(rank)},
            )
            for rank in range(count)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            raise UserError(f"a rank of {count} failed: see above")
        times = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return {name: max(time[name] for time in times) for name in times[0]}


def be_a_rank(folder: Path) -> None:
    """Goes through a start and writes the times."""
    from samba_megatron.config import ParallelConfig
    from samba_megatron.platform import cpu_shim, distributed, noise

    with noise.quiet_imports():
        cpu_shim.install()
        noise.import_megatron()
    import torch

    rank, count = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    (folder / f"{rank}.ready").touch()
    while len(list(folder.glob("*.ready"))) < count:
        time.sleep(0.01)
    times, last = {}, time.perf_counter()

    def note(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        times[name], last = now - last, now

    torch.distributed.init_process_group("gloo")
    note("rendezvous")
    distributed.initialize(ParallelConfig(pipeline_model_parallel_size=2))
    note("process groups")
    torch.distributed.all_reduce(torch.ones(1))
    note("first all-reduce")
    # What a save does with each rank's list of tensors.
    distributed.gather_text("x" * 100_000)
    note("gather 100 kB a rank")
    (folder / f"{rank}.json").write_text(json.dumps(times))
    torch.distributed.barrier()


if __name__ == "__main__":
    run_command(main)
