"""Quantises an export (convert_checkpoint.py to-hf) with NVIDIA's modelopt, and says what it costs.

    quantize.py --model samba-hf --format fp8 --calibration corpus.jsonl --output samba-fp8
    quantize.py --model samba-hf --format int4_awq --calibration data/validation --output samba-int4

The convolution, norms, A_log, D, the embedding and the head stay as they are; so do x_proj and
dt_proj, unless --keep names others (parts of the names of modules).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from samba_megatron.platform.distributed import chosen_device
from samba_megatron.platform.errors import UserError, run_command

FORMATS = ("fp8", "nvfp4", "int8_sq", "int4_awq")
KEPT = ("x_proj", "dt_proj")


def main() -> None:
    """Quantises, and prints sizes and perplexities."""
    arguments = _parse()
    from samba_megatron.checkpoint.huggingface.quantizing import QuantizeOptions, quantize

    report = quantize(
        QuantizeOptions(
            model=arguments.model,
            output=arguments.output,
            format=arguments.format,
            calibration=arguments.calibration,
            held_out=arguments.held_out,
            keep=tuple(arguments.keep),
            samples=arguments.samples,
            length=arguments.length,
            device=chosen_device(arguments.device),
        ),
        notice=lambda text: print(text, file=sys.stderr, flush=True),
    )
    _print(report, arguments.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="exported folder")
    add("--format", choices=FORMATS, required=True, help="nvfp4 needs a GPU")
    add("--calibration", type=Path, required=True, help="JSON lines, or an indexed dataset")
    add("--output", type=Path, required=True, help="folder to make")
    add("--held-out", type=Path, help="for the perplexity (a tenth of the calibration's blocks)")
    add("--keep", nargs="+", default=KEPT, metavar="PART", help=f"spared ({' '.join(KEPT)})")
    add("--samples", type=int, default=128, help="blocks for calibration (128)")
    add("--length", type=int, default=512, help="tokens of a block (512)")
    add("--device", default="auto", help="auto, cpu or cuda (auto)")
    arguments = parser.parse_args()
    if arguments.samples < 1 or arguments.length < 2:
        raise UserError("--samples must be 1 or more and --length 2 or more")
    return arguments


def _print(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "before", report["format"], "read back from the files")
    sizes = [f"{report['bytes'][when] / 1e6:,.2f} MB" for when in ("before", "after")]
    table.add_row("weights", *sizes, "")
    values = [f"{report['perplexity'][when]:.3f}" for when in ("before", "after", "read_back")]
    table.add_row("perplexity, held out", *values)
    errors = [f"{report['error'][where]:.2%}" for where in ("in_memory", "read_back")]
    table.add_row("error of the logits", "", *errors)
    Console().print(table)
    print(
        f"{output}: {len(report['quantized'])} matrices quantised, "
        f"{report['held_out_tokens']:,} tokens held out"
    )


if __name__ == "__main__":
    run_command(main)
