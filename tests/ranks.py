"""Several real ranks for a test, which share the price of their imports.

A process that has torch and megatron in it costs seconds of processor time, more than what most of
these programs do. So one process imports them and becomes the ranks by forking; each is seeded anew
and meets the others as always. On a machine with GPUs it forks first: CUDA does not survive a fork.
That ranks start by torchrun, as a user's do, is for other tests.

    python -m tests.ranks FOLDER RANKS MODULE ARGUMENTS…
"""

import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, world_size: int, *arguments: object, timeout: float = 240) -> str:
    """Runs ``python -m module arguments…`` on every rank; what each has said, one after the other.

    Raises:
        AssertionError: with that text, if a rank fails or takes longer than ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [folder, str(world_size), module, *map(str, arguments)]
        ranks = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.ranks", *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            code: object = ranks.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"no end within {timeout} s"
        finally:
            end_group(ranks)
        logs = [Path(folder, f"rank_{rank}.log") for rank in range(world_size)]
        said = [log.read_text(errors="replace").strip() for log in logs if log.exists()]
    text = "\n".join(filter(None, said))
    assert code == 0, f"{module}: {code}\n{text[-8000:]}"
    return text


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills whatever is left of a process and its children."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def become_ranks(folder: Path, world_size: int, program: list[str]) -> int:
    """Forks the ranks and waits for them; the first code that is not 0. The rest is then killed,
    since it would wait for the one that is gone."""
    if not shutil.which("nvidia-smi"):
        _import_what_most_need()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    ranks: dict[int, int] = {}
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
            _be(folder / f"rank_{rank}.log", program)
        ranks[process] = rank
    while ranks:
        process, status = os.wait()
        ranks.pop(process)
        code = os.waitstatus_to_exitcode(status)
        if code:
            time.sleep(0.5)  # what the others say of it is worth reading too
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return code if code > 0 else 128 - code
    return 0


def _be(log: Path, program: list[str]) -> None:
    """Runs a module as a process of its own would, and ends."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    _seed_anew()
    sys.argv = program
    code = 0
    try:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _seed_anew() -> None:
    """Ranks that were alike by the fork alone would hide that they must be seeded alike."""
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()


def _import_what_most_need() -> None:
    from samba_megatron.platform import cpu_shim, noise

    with noise.quiet_imports():
        cpu_shim.install()
        noise.import_megatron()
        import samba_megatron.training.entry
        import samba_megatron.training.loop
        import samba_megatron.training.setup  # noqa: F401


if __name__ == "__main__":
    sys.exit(become_ranks(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
