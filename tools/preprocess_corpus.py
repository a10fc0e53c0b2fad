"""Tokenizes a corpus into Megatron's indexed datasets (.bin and .idx), with a manifest.

Interrupted, the same command goes on where it stopped. Of prompts with completions, or of
conversations, a second dataset, PREFIX_loss_mask, says on which tokens the loss counts.
"""

import argparse
import os
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from samba_megatron.config.units import parse_bytes
from samba_megatron.data.preprocessing.estimate import estimate
from samba_megatron.data.preprocessing.options import (
    PreprocessOptions,
    PreprocessReport,
    SlurmOptions,
)
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.preprocessing.stages import STAGES, parse_stages, read_stages
from samba_megatron.platform.errors import UserError, run_command


def main() -> None:
    """Runs the command."""
    arguments = vars(_parser().parse_args())
    if _is_instructions(arguments):
        _instructions(arguments)
        return
    dry_run = arguments.pop("dry_run")
    options = _options(arguments)
    if dry_run:
        title, rows = f"{options.output_prefix} (dry run)", estimate(options)
        _print_table(title, rows)
        return
    report = preprocess(options)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if report.up_to_date:
        print(f"{report.prefix} is up to date")
    else:
        _print_summary(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        help="files, folders, globs or URLs: .jsonl, .txt (also .gz, .zst), .parquet",
    )
    add("--tokenizer", required=True, help="folder, tokenizer.json, .model, .tiktoken or name")
    add("--output-prefix", required=True, help="path of the dataset without .bin or .idx")
    add(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenize (one a core); with --slurm: jobs at a time",
    )
    add("--text-key", default="text", help="the key or column that holds the text (text)")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's EOS token",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part of the documents, by a hash of their text, that goes to P_validation (0)",
    )
    add("--dry-run", action="store_true", help="say what would be done, with sizes and time")
    add("--overwrite", action="store_true", help="replace a dataset made from something else")
    _add_shards(parser)
    _add_checks(parser)
    _add_instructions(parser)
    _add_stages(parser)
    _add_slurm(parser)
    return parser


def _add_shards(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--shard-size",
        dest="shard_bytes",
        metavar="SIZE",
        help="text in a shard, about, as 500MB or 8GB; a bare number is of MB (default: 256MB, or "
        "so much that 2,000 shards suffice)",
    )
    group.add_argument("--merge", action="store_true", help="join the shards to one dataset")


def _add_checks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checks")
    group.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="what a place without a usable document does (fail)",
    )
    group.add_argument(
        "--max-errors",
        type=int,
        default=0,
        metavar="N",
        help="with fail: pass over and report so many before failing (0)",
    )
    group.add_argument(
        "--engine",
        choices=("auto", "huggingface"),
        default="auto",
        help="auto: gigatoken where it gives the same tokens as Hugging Face",
    )
    group.add_argument(
        "--verify", action="store_true", help="compare all documents with Hugging Face's tokens"
    )


def _add_instructions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts with completions, or conversations (JSON lines)")
    group.add_argument("--prompt-key", metavar="KEY", help="text on which the loss does not count")
    group.add_argument("--completion-key", metavar="KEY", help="text on which it does")
    group.add_argument(
        "--messages-key", metavar="KEY", help="list of role and content; assistant's turns count"
    )
    group.add_argument(
        "--turn-format", metavar="TEXT", help=r"of conversations ({role}: {content}\n)"
    )


def _is_instructions(arguments: dict[str, Any]) -> bool:
    """Whether a dataset with a loss mask is asked for; else its options are taken out."""
    names = ("prompt_key", "completion_key", "messages_key", "turn_format")
    if any(arguments[name] is not None for name in names):
        return True
    for name in names:
        del arguments[name]
    return False


def _instructions(arguments: dict[str, Any]) -> None:
    from samba_megatron.data.preprocessing.instructions import (
        TURN_FORMAT,
        InstructionOptions,
        preprocess_instructions,
    )

    elsewhere = ("dry_run", "validation_fraction", "shard_bytes", "merge", "verify", "stages")
    for name in (*elsewhere, "max_errors", "slurm", *STAGES):
        if arguments[name]:
            option = name.replace("shard_bytes", "shard_size").replace("_", "-")
            raise UserError(f"--{option} is for plain text: leave it out for a dataset with a mask")
    form = arguments["turn_format"]
    options = InstructionOptions(
        inputs=arguments["input"],
        turn_format=TURN_FORMAT if form is None else form.replace("\\n", "\n"),
        **{
            name: arguments[name]
            for name in ("tokenizer", "output_prefix", "prompt_key", "completion_key")
        },
        **{
            name: arguments[name]
            for name in ("messages_key", "append_eod", "on_error", "overwrite")
        },
    )
    report = preprocess_instructions(options)
    share = 100 * report.counted / report.tokens
    rows = {
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,}",
        "of these the loss counts on": f"{report.counted:,} ({share:.1f} %)",
        "skipped": f"{report.skipped:,}",
        "time": f"{report.seconds:.1f} s",
    }
    _print_table(options.output_prefix, rows)


def _add_stages(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("stages", "in this order, or as a file lists them")
    group.add_argument("--stages", metavar="FILE", help="YAML: a list of stages with options")
    for name, what in STAGES.items():
        if name == "language":
            group.add_argument("--language", nargs="+", metavar=("MODEL", "CODE"), help=what)
        elif name == "length":
            group.add_argument("--length", nargs=2, type=int, metavar=("MIN", "MAX"), help=what)
        else:
            group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=what)


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Slurm")
    group.add_argument("--slurm", action="store_true", help="run the shards as an array of jobs")
    group.add_argument("--slurm-partition", metavar="NAME")
    group.add_argument("--slurm-time", default="24:00:00", metavar="TIME")
    group.add_argument("--slurm-memory", type=int, default=2, metavar="GB", help="of a job (2)")
    group.add_argument("--slurm-shards-per-job", type=int, default=1, metavar="N", help="(1)")
    group.add_argument(
        "--slurm-args", nargs="+", default=[], metavar="KEY=VALUE", help="any options of sbatch"
    )


def _options(arguments: dict[str, Any]) -> PreprocessOptions:
    if arguments["shard_bytes"] is not None:
        arguments["shard_bytes"] = parse_bytes("--shard-size", arguments["shard_bytes"], "MB")
    arguments["stages"] = _stages(arguments)
    arguments["slurm"] = _slurm(arguments)
    return PreprocessOptions(inputs=arguments.pop("input"), **arguments)


def _stages(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages of the flags, or those of the file."""
    chosen: list[Any] = []
    for name in STAGES:
        value = arguments.pop(name)
        if name == "language" and value:
            chosen.append({name: {"model": value[0], "languages": value[1:]}})
        elif name == "length" and value:
            chosen.append({name: {"min_characters": value[0], "max_characters": value[1]}})
        elif value:
            chosen.append(name)
    if arguments["stages"] and chosen:
        raise UserError("--stages lists all stages: leave out the flags of single stages")
    if arguments["stages"]:
        return read_stages(arguments["stages"])
    return parse_stages(chosen, "the flags")


def _slurm(arguments: dict[str, Any]) -> SlurmOptions | None:
    given = {name: arguments.pop(name) for name in list(arguments) if name.startswith("slurm_")}
    if not arguments["slurm"]:
        return None
    pairs = [entry.lstrip("-").partition("=") for entry in given["slurm_args"]]
    return SlurmOptions(
        partition=given["slurm_partition"],
        time=given["slurm_time"],
        mem_per_cpu_gb=given["slurm_memory"],
        tasks_per_job=given["slurm_shards_per_job"],
        sbatch_args={key: value for key, _, value in pairs},
    )


def _print_summary(report: PreprocessReport) -> None:
    """Prints what was written, and what was passed over and where."""
    rows = {
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,}",
        "text": f"{report.text_bytes / 1e6:,.1f} MB",
        "bytes a token": f"{report.text_bytes / report.tokens:.2f}",
        "time": f"{report.seconds:.1f} s",
        "speed": f"{report.read_bytes / 1e6 / report.seconds:.1f} MB/s",
        "tokens a second": f"{report.tokens / report.seconds:,.0f}",
        "engine": str(report.engine),
        "shards": f"{report.shards:,}",
    }
    if report.shards_kept:
        rows["of these done before"] = f"{report.shards_kept:,}"
    if len(report.splits) > 1:
        for split, counts in reversed(report.splits.items()):
            rows[split] = f"{counts['documents']:,} documents, {counts['tokens']:,} tokens"
    for stage in report.stages:
        counts = stage["counts"]
        rows[stage["name"]] = f"kept {counts.get('forwarded', 0):,} of {counts.get('total', 0):,}"
    rows |= {f"skipped: {reason}": f"{count:,}" for reason, count in report.skipped.items()}
    _print_table(report.prefix, rows)
    for example in report.skipped_examples:
        print(f"skipped {example}")
    for path in report.blend_files:
        print(f"blend file: {path}")


def _print_table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
