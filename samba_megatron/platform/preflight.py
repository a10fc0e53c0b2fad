"""Is this node fit for work? A check of seconds, before the first step and after a failure.

python -m samba_megatron.platform.preflight --output DIR [--gpus 8] [--min-free-gb 500]
srun … python -m samba_megatron.platform.preflight --output DIR --across

The first form is run once a node. It writes ``DIR/<node>.json`` and ends with 0, or with 77 ("this
node is bad") where something is wrong. The second form runs as one job of as many processes as the
training has: it measures the network, and rank 0 writes ``DIR/across.json``.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from samba_megatron.platform import matmul_rate, nvidia_smi
from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.files import write_text
from samba_megatron.platform.hardware import node_name


def main() -> ExitCode:
    """Checks the node, or the network between the nodes."""
    arguments = _parse()
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {arguments.output} cannot be made ({error.strerror}): choose a folder that "
            "all nodes share",
            rank_specific=True,
        ) from None
    if arguments.across:
        from samba_megatron.platform.across import check_across

        return check_across(arguments.output, arguments.across_seconds)
    report = check_node(
        arguments.gpus, arguments.disk or arguments.output, arguments.min_free_gb,
        arguments.min_matmul_tflops,
    )  # fmt: skip
    write_report(arguments.output / f"{report['node']}.json", report)
    for problem in report["problems"]:
        print(f"{report['node']}: {problem}", flush=True)
    return ExitCode.DONE if report["ok"] else ExitCode.BAD_NODE


def check_node(
    gpus: int | None, disk: Path, min_free_gb: float, min_matmul_tflops: float | None
) -> dict[str, Any]:
    """Everything that can be known about this node alone.

    Args:
        gpus: how many GPUs there must be; None does not count them.
        disk: a folder whose file system must have room.
        min_free_gb: how much, in 10^9 bytes.
        min_matmul_tflops: what each device must reach; None compares GPUs with each other only.

    Returns:
        ``node``, ``ok``, ``problems`` (sentences), ``time``, ``seconds``, and what was measured:
        ``gpus``, ``free_gb``, ``matmul``.
    """
    started = time.monotonic()
    described = nvidia_smi.query()
    free, problems = _free_gb(disk, min_free_gb)
    problems += [*_count_gpus(gpus), *nvidia_smi.problems(described), *nvidia_smi.dcgm_problems()]
    rates, wrong = matmul_rate.measure()
    problems += wrong + matmul_rate.too_slow(rates, min_matmul_tflops)
    return {
        "node": node_name(),
        "ok": not problems,
        "problems": problems,
        "time": round(time.time(), 3),
        "seconds": round(time.monotonic() - started, 2),
        "gpus": described,
        "free_gb": free,
        "matmul": rates,
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replaces ``path`` at once: a reader sees a whole report or none."""
    write_text(path, json.dumps(report, indent=1) + "\n")


def _count_gpus(expected: int | None) -> list[str]:
    import torch

    found = torch.cuda.device_count()
    if expected is None or found == expected:
        return []
    return [f"torch finds {found} GPUs, {expected} are wanted"]


def _free_gb(disk: Path, least: float) -> tuple[float | None, list[str]]:
    """(room in 10^9 bytes, problems), after a file was written there."""
    probe = disk / f".preflight-{node_name()}-{os.getpid()}"
    try:
        probe.write_bytes(b"0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(disk).free / 1e9
    except OSError as error:
        return None, [f"{disk} cannot be written to ({error.strerror})"]
    short = free < least
    return round(free, 3), [f"{disk} has {free:.2f} GB free, {least:g} are wanted"] * short


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samba_megatron.platform.preflight",
        description="Checks this node, or with --across the network of a job; ends with 0 or 77.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the reports")
    parser.add_argument("--gpus", type=int, help="GPUs that the node must have")
    parser.add_argument("--disk", type=Path, help="folder that must have room; default: --output")
    parser.add_argument("--min-free-gb", type=float, default=0.0, help="room that it must have")
    parser.add_argument("--min-matmul-tflops", type=float, help="what each device must reach")
    parser.add_argument("--across", action="store_true", help="measure the network of the job")
    parser.add_argument(
        "--across-seconds", type=float, default=120.0, help="time until missing ranks are named"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
