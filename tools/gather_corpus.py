"""Gathers the Python standard library's sources as a corpus of JSON lines."""

import argparse
from pathlib import Path

from samba_megatron.data.corpus import gather_corpus
from samba_megatron.platform.errors import run_command


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for train.jsonl and validation.jsonl"
    )
    parser.add_argument(
        "--max-megabytes", type=float, help="take at most this many MB of sources (default: all)"
    )
    arguments = parser.parse_args()
    report = gather_corpus(arguments.output, arguments.max_megabytes)
    for name, count in (("train", report.train), ("validation", report.validation)):
        print(
            f"{arguments.output / name}.jsonl: {count.documents:,} documents, "
            f"{count.text_bytes / 1e6:.1f} MB"
        )
    print(
        f"left out: {report.undecodable} not UTF-8, {report.empty} empty, "
        f"{report.over_budget} over --max-megabytes"
    )


if __name__ == "__main__":
    run_command(main)
