"""Times the selective scan's kernels beside one another, forward and backward.

    python tools/benchmark_scan.py --output measured/scan
    python tools/benchmark_scan.py --shapes 4608x8x4096 --kernels fused mamba_ssm --parts

A shape is d_inner × batch × length. Figures are medians of single calls, timed by the device's own
clock. "mamba_ssm" is the published kernel on the layout it wants; "mamba_ssm with copies" is what a
model whose activations are [time, batch, channel] pays for it. GB/s counts the least that must be
moved (inputs read once, outputs and gradients written once).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import run_command  # noqa: E402

KERNELS = ("fused", "mamba_ssm", "mamba_ssm with copies", "torch")


def main() -> None:
    """Measures every kernel at every shape, prints the table and writes the JSON."""
    args = parse_arguments()
    from samba_megatron.ops.selective_scan.benchmark import run_benchmark

    run_benchmark(args)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", help="d_inner x batch x length, as 4608x8x4096")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:3])
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--states", type=int, default=16, help="d_state (default: 16)")
    parser.add_argument("--repeats", type=int, default=20, help="calls a median is of")
    parser.add_argument("--parts", action="store_true", help="time each CUDA kernel by itself too")
    parser.add_argument("--output", type=Path, help="folder for scan.json")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
