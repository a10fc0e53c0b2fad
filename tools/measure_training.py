"""Measures whole training steps: recipes × precisions on real tokens, one table at the end.

    python tools/measure_training.py --recipes samba_421m samba_1.3b \
        --precisions bf16 fp8_delayed fp8_tensorwise --steps 120 \
        --data-path data/train --output measured

Each run goes through the same entry point as any other. Figures are medians over the second half
of the steps; the loss is the mean of the last twenty. With ``-- --checkpoint.load CHECKPOINTS`` all
start from one trained state and go on to step ``--steps``.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.tracking.metrics import read_metrics  # noqa: E402

PRECISIONS: dict[str, list[str]] = {
    "fp32": ["--precision.params_dtype", "fp32"],
    "bf16": ["--precision.params_dtype", "bf16"],
    **{
        f"fp8_{recipe}": [
            *("--precision.params_dtype", "bf16"),
            *("--precision.fp8", "hybrid", "--precision.fp8_recipe", recipe),
        ]
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8")
    },
}


def main() -> None:
    """Runs every combination and prints the table."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for recipe in args.recipes:
        for precision in args.precisions:
            rows.append(measure(args, recipe, precision))
            (args.output / "measured.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipes", nargs="+", required=True)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--global-batch-size", type=int, default=8)
    parser.add_argument("--data-path", required=True, help="dataset prefix")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further dotted overrides, after --")
    return parser.parse_args()


def recipe_name(recipe: str) -> str:
    """``samba_1.3b`` for itself and for its file."""
    return Path(recipe).name.removesuffix(".yaml")


def measure(args: argparse.Namespace, recipe: str, precision: str) -> dict[str, Any]:
    """One run; its row of the table.

    Raises:
        UserError: if the run failed; its output is in the log named.
    """
    run_dir = args.output / f"{recipe_name(recipe)}_{precision}"
    print(f"{run_dir.name}: {args.steps} steps …", flush=True)
    log = args.output / f"{run_dir.name}.log"
    with open(log, "w", encoding="utf-8") as out:
        result = subprocess.run(command(args, recipe, precision, run_dir), stdout=out, stderr=out)
    if result.returncode:
        raise UserError(f"{run_dir.name} ended with code {result.returncode}: see {log}")
    row = summarise(run_dir, args.steps)
    print(table([row]), flush=True)
    return {"recipe": recipe_name(recipe), "precision": precision, **row}


def command(args: argparse.Namespace, recipe: str, precision: str, run_dir: Path) -> list[str]:
    """The training command of one combination: nothing is saved, nothing validated."""
    fields = {
        "run_dir": run_dir,
        "data.data_path": json.dumps([args.data_path]),
        "data.split": "100,0,0",
        "training.train_tokens": "null",
        "training.train_steps": args.steps,
        "training.micro_batch_size": args.micro_batch_size,
        "training.global_batch_size": args.global_batch_size,
        "schedule.lr_warmup_steps": max(args.steps // 10, 1),
        "validation.eval_interval": "null",
        "validation.eval_at_start": "false",
        "validation.eval_at_end": "false",
        "checkpoint.save_interval": "null",
        "checkpoint.save_at_end": "false",
        "logging.progress": "plain",
    }
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(args.processes)),
        *(str(ROOT / "pretrain" / "pretrain_samba.py"), "--config", recipe),
        *(part for name, value in fields.items() for part in (f"--{name}", str(value))),
        *PRECISIONS[precision],
        *args.overrides,
    ]


def summarise(run_dir: Path, steps: int) -> dict[str, Any]:
    """Medians over the second half of a run's steps."""
    start = read_metrics(run_dir / "metrics.jsonl", "start")[-1]
    records = read_metrics(run_dir / "metrics.jsonl", "train")
    steps -= start["step"]  # those before a checkpoint that it started from are not its own
    if len(records) != steps:
        raise UserError(f"{run_dir} has {len(records)} steps of {steps}: remove it and run again")
    second_half = records[len(records) // 2 :]

    def median(name: str) -> float | None:
        values = [record[name] for record in second_half if record[name] is not None]
        return statistics.median(values) if values else None

    return {
        "name": run_dir.name,
        "device": start["device"],
        "parameters": start["parameters"],
        "kernels": start["kernels"],
        "versions": start["versions"],
        "tokens_per_second": median("tokens_per_second"),
        "tflops_per_device": median("tflops_per_device"),
        "mfu": median("mfu"),
        "memory_gib": max(record["memory_gib"] for record in records),
        "first_loss": records[0]["loss"],
        "last_loss": statistics.fmean(record["loss"] for record in records[-20:]),
        "losses": [round(record["loss"], 5) for record in records],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| run | tok/s | TFLOP/s | MFU | memory GiB | loss, last 20 steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] is not None else "–"
        lines.append(
            f"| {row['name']} | {row['tokens_per_second']:,.0f} | {row['tflops_per_device']:.1f} "
            f"| {mfu} | {row['memory_gib']:.1f} | {row['last_loss']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
