"""Tokenizes JSON lines into Megatron's indexed dataset (.bin and .idx), with a manifest."""

import argparse
import os
import sys

from rich.console import Console
from rich.table import Table

from samba_megatron.data.preprocess import PreprocessOptions, PreprocessReport, preprocess
from samba_megatron.platform.errors import run_command


def main() -> None:
    """Runs the command."""
    report = preprocess(_options())
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if report.up_to_date:
        print(f"{report.prefix} is up to date")
    else:
        _print_summary(report)


def _options() -> PreprocessOptions:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSON lines files or globs (.gz and .zst too)"
    )
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--output-prefix", required=True, help="path of the dataset without .bin or .idx"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize (default: one a core)",
    )
    parser.add_argument("--text-key", default="text", help="the key that holds the text")
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's EOS token",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what a malformed line or empty document does",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "huggingface"),
        default="auto",
        help="auto: gigatoken where it gives the same tokens as Hugging Face",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset made from something else"
    )
    arguments = vars(parser.parse_args())
    return PreprocessOptions(inputs=arguments.pop("input"), **arguments)


def _print_summary(report: PreprocessReport) -> None:
    """Prints what was written, and what was passed over and where."""
    table = Table(title=report.prefix, show_header=False, title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    rows = {
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,}",
        "text": f"{report.text_bytes / 1e6:,.1f} MB",
        "bytes a token": f"{report.text_bytes / report.tokens:.2f}",
        "time": f"{report.seconds:.1f} s",
        "speed": f"{report.read_bytes / 1e6 / report.seconds:.1f} MB/s",
        "tokens a second": f"{report.tokens / report.seconds:,.0f}",
        "engine": str(report.engine),
    }
    rows |= {f"skipped: {reason}": f"{count:,}" for reason, count in report.skipped.items()}
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    for example in report.skipped_examples:
        print(f"skipped {example}")


if __name__ == "__main__":
    run_command(main)
