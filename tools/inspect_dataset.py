"""Shows what is in an indexed dataset or a blend file, and checks that it is whole.

Exit code 1: something is damaged. Exit code 2: the command is wrong.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from samba_megatron.data.blend import Blend, read_blend_files
from samba_megatron.data.inspection import (
    Inspection,
    inspect_dataset,
    plot_lengths,
    read_documents,
    together,
)
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError, run_command

_DAMAGED = 1
_BAR = 28
_IDS_SHOWN = 64


def main() -> int:
    """Runs the command."""
    arguments = _arguments()
    console = Console(soft_wrap=True, highlight=False)
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    is_blend = arguments.dataset.endswith((".yaml", ".yml"))
    blend = read_blend_files([arguments.dataset]) if is_blend else None
    if blend and arguments.documents:
        raise UserError(
            "--documents needs a dataset: give the prefix of one of the blend's sources"
        )
    prefixes = blend.prefixes if blend else [arguments.dataset]
    if tokenizer:
        for prefix in prefixes:
            _check_tokenizer(prefix, tokenizer)
    found = _inspect(prefixes, tokenizer, not arguments.quick, console)
    problems = [problem for inspection in found for problem in inspection.problems]
    if blend:
        problems += _print_blend(blend, found, console)
    else:
        _print_dataset(found[0], console)
    histogram = together(found)
    _print_histogram(histogram, console)
    if arguments.plot:
        plot_lengths(histogram, arguments.plot, Path(arguments.dataset).name)
        console.print(f"{arguments.plot}")
    if not problems and arguments.documents:
        _print_documents(arguments, tokenizer, console)
    for problem in problems:
        console.print(f"DAMAGED: {problem}", markup=False, style="bold red")
    return _DAMAGED if problems else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dataset", metavar="PREFIX", help="path without .bin or .idx, or a blend file (.yaml)")
    add("--documents", type=_numbers, help="show these, counted from 0, as 3,17 or 5-8")
    add("--tokenizer", help="to show documents as text, and to check the ids against")
    add("--characters", type=int, default=2000, help="most of a document's text (default: 2000)")
    add("--plot", type=Path, metavar="FILE", help="write the histogram of lengths as a PNG")
    add("--quick", action="store_true", help="do not read the tokens: no check of ids and hash")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    try:
        ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    except ValueError:
        ends = []
    if not ends or any(len(end) > 2 for end in ends):
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers such as 3,17 or 5-8")
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def _check_tokenizer(prefix: str, tokenizer: Tokenizer) -> None:
    manifest = read_manifest(prefix)
    made_with = manifest.tokenizer.get("identity") if manifest else None
    if made_with not in (None, tokenizer.identity):
        raise UserError(
            f"{tokenizer.path} is not the tokenizer that {prefix} was made with: give that one"
        )


def _inspect(
    prefixes: list[str], tokenizer: Tokenizer | None, read_tokens: bool, console: Console
) -> list[Inspection]:
    vocab_size = tokenizer.vocab_size if tokenizer else None
    found = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("")
        for number, prefix in enumerate(prefixes, 1):
            name = f"{Path(prefix).name} ({number} of {len(prefixes)})"
            progress.update(task, description=name, completed=0)
            found.append(
                inspect_dataset(
                    prefix,
                    vocab_size,
                    read_tokens,
                    lambda done, total: progress.update(task, completed=done, total=total),
                )
            )
    return found


def _print_dataset(found: Inspection, console: Console) -> None:
    rows = {
        "documents": f"{found.documents:,}",
        "tokens": f"{found.tokens:,}",
        "type": found.dtype,
        "size": f"{found.bytes / 1e6:,.1f} MB",
    }
    if found.largest_id is not None:
        rows["largest token id"] = f"{found.largest_id:,}"
    rows |= {f"{name} document": f"{value:,} tokens" for name, value in found.quantiles.items()}
    rows |= {f"checked {number}": text for number, text in enumerate(found.checked, 1)}
    table = Table(title=escape(found.prefix), show_header=False, title_justify="left", box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _print_blend(blend: Blend, found: list[Inspection], console: Console) -> list[str]:
    """The sources of a blend; returns where the file does not agree with the datasets."""
    weights = blend.own_weights([inspection.tokens for inspection in found])
    whole = sum(weights) or 1.0
    table = Table(title=blend.place, title_justify="left", box=None)
    for column in ("source", "share", "tokens", "documents", "max epochs", ""):
        table.add_column(column, justify="left" if column in ("source", "") else "right")
    problems = []
    for source, weight, seen in zip(blend.sources, weights, found, strict=True):
        for what in ("tokens", "documents"):
            said, there = getattr(source, what), getattr(seen, what)
            if said is not None and said != there and not seen.problems:
                problems.append(f"{blend.place} says {source.name} has {said} {what}, not {there}")
        table.add_row(
            escape(source.name),
            f"{100 * weight / whole:.2f}%",
            f"{seen.tokens:,}",
            f"{seen.documents:,}",
            f"{source.max_epochs:g}" if source.max_epochs else "",
            "damaged" if seen.problems else "whole",
        )
    console.print(table)
    for number, stage in enumerate(blend.stages, 1):
        shares = blend.stage_weights(stage, [inspection.tokens for inspection in found])
        parts = [
            f"{source.name} {100 * share / sum(shares):.2f}%"
            for source, share in zip(blend.sources, shares, strict=True)
            if share
        ]
        until = f"until {stage.until_tokens:,} tokens" if stage.until_tokens else "to the end"
        more = f" and {len(parts) - 10} more" if len(parts) > 10 else ""
        console.print(f"stage {number}, {until}: {', '.join(parts[:10])}{more}")
    return problems


def _print_histogram(histogram: list[tuple[int, int, int, int]], console: Console) -> None:
    if not histogram:
        return
    most = max(documents for _, _, documents, _ in histogram)
    total = sum(tokens for *_, tokens in histogram) or 1
    table = Table(title="lengths in tokens", title_justify="left", box=None)
    for column in ("from", "to", "documents", "of all tokens", ""):
        table.add_column(column, justify="left" if not column else "right")
    for start, end, documents, tokens in histogram:
        bar = "█" * round(_BAR * documents / most) or ("▏" if documents else "")
        last, share = f"{max(end - 1, start):,}", f"{100 * tokens / total:.1f}%"
        table.add_row(f"{start:,}", last, f"{documents:,}", share, bar)
    console.print(table)


def _print_documents(
    arguments: argparse.Namespace, tokenizer: Tokenizer | None, console: Console
) -> None:
    for number, ids in read_documents(arguments.dataset, arguments.documents).items():
        console.print(f"── document {number}: {len(ids):,} tokens", style="bold")
        if tokenizer is None:
            more = f" … {len(ids) - _IDS_SHOWN:,} more" if len(ids) > _IDS_SHOWN else ""
            console.print(" ".join(map(str, ids[:_IDS_SHOWN].tolist())) + more)
            continue
        text = tokenizer.decode(ids.tolist())
        left = len(text) - arguments.characters
        more = f"\n… {left:,} more characters" if left > 0 else ""
        console.print(text[: arguments.characters] + more, markup=False, emoji=False)


if __name__ == "__main__":
    run_command(main)
