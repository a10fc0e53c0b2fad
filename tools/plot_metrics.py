"""Draws the losses of a run from its metrics.jsonl."""

import argparse
from pathlib import Path

from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.tracking.metrics import FILE_NAME, read_metrics
from samba_megatron.tracking.plot import plot_losses


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--output", type=Path, help="the picture (default: loss.png in the run)")
    arguments = parser.parse_args()
    metrics = arguments.run_dir / FILE_NAME
    if not metrics.exists():
        raise UserError(f"{metrics} does not exist: name the folder of a run that has begun")
    output = arguments.output or arguments.run_dir / "loss.png"
    plot_losses(read_metrics(metrics), output, arguments.run_dir.resolve().name)
    print(output)


if __name__ == "__main__":
    run_command(main)
