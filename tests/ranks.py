"""Starts test programs as the ranks of a world on this machine, without the price of torchrun: it
imports torch itself. That ranks start by torchrun, as a user's do, is for other tests."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[1]


def run_ranks(module: str, world_size: int, *arguments: object, timeout: float = 500) -> str:
    """Runs ``python -m module arguments…`` on every rank; the output of all.

    Raises:
        AssertionError: with the output, if a rank fails or takes longer than ``timeout`` seconds.
    """
    # Nobody to meet, no port.
    meeting = (
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if world_size > 1 else {}
    )
    logs: list[IO[bytes]] = [tempfile.TemporaryFile() for _ in range(world_size)]  # noqa: SIM115
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **meeting,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
            },
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    deadline = time.monotonic() + timeout
    try:
        # When one rank has failed, the others would wait for it.
        while any(rank.poll() is None for rank in ranks) and not any(r.poll() for r in ranks):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
        codes = [rank.wait() for rank in ranks]
    text = "\n".join(filter(None, (read(log).strip() for log in logs)))
    assert codes == [0] * world_size, f"{module} ended with {codes}\n{text[-8000:]}"
    return text


def free_port() -> int:
    """Below those that Linux gives to whoever asks for any, as it is taken seconds later, and below
    those of the private Slurm."""
    while True:
        port = random.SystemRandom().randrange(12_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def read(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")
