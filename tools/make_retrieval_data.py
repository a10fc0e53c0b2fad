"""Writes documents to train retrieval on as JSON lines: passkeys in filler text, or phonebooks.

    make_retrieval_data.py passkey --tokenizer corpus/tokenizer --length 4096 --count 100000 \
        --output passkey.jsonl
    make_retrieval_data.py phonebook --pairs 70 --count 100000 --output phonebook.jsonl

A line has a prompt and its completion; with --text both are one text. The same options make the
same file.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from samba_megatron.platform.errors import UserError, run_command
from samba_megatron.platform.files import atomic_write


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    written = 0
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output) as stream:
            for example in arguments.make(arguments):
                whole = {"text": example["prompt"] + example["completion"]}
                line = whole if arguments.text else example
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
    except OSError as problem:
        raise UserError(f"--output {arguments.output}: {problem.strerror}") from None
    print(f"{arguments.output}: {written:,} documents")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    passkey = kinds.add_parser("passkey", help="a key of five digits in filler text")
    passkey.add_argument("--tokenizer", type=Path, required=True, help="lengths are in its tokens")
    passkey.add_argument("--length", type=int, default=4096, help="tokens, at most (4096)")
    passkey.add_argument("--shortest", type=int, help="draw lengths from here to --length")
    passkey.set_defaults(make=_passkey)
    phonebook = kinds.add_parser("phonebook", help="names and numbers, and a name again")
    phonebook.add_argument("--pairs", type=int, default=70, help="pairs of a book (70)")
    phonebook.add_argument("--fewest", type=int, help="draw numbers of pairs from here to --pairs")
    phonebook.set_defaults(make=_phonebook)
    for kind in (passkey, phonebook):
        kind.add_argument("--count", type=int, required=True, help="documents")
        kind.add_argument("--output", type=Path, required=True, help="file to write")
        kind.add_argument("--seed", type=int, default=1234, help="(1234)")
        kind.add_argument("--prompts", type=Path, help="YAML or JSON with other sentences")
        kind.add_argument("--text", action="store_true", help="prompt and completion as one text")
    arguments = parser.parse_args()
    if arguments.count < 1:
        raise UserError(f"--count is {arguments.count}: use 1 or more")
    return arguments


def _passkey(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    from samba_megatron.data.tokenizer import load_tokenizer
    from samba_megatron.evaluation.prompts import load_prompt
    from samba_megatron.evaluation.retrieval_data import PasskeyData

    _require_order("--shortest", arguments.shortest, "--length", arguments.length)
    return PasskeyData(
        load_tokenizer(arguments.tokenizer),
        arguments.length,
        arguments.shortest,
        arguments.seed,
        load_prompt("passkey", arguments.prompts),
    ).examples(arguments.count)


def _phonebook(arguments: argparse.Namespace) -> Iterator[dict[str, str]]:
    from samba_megatron.evaluation.prompts import load_prompt
    from samba_megatron.evaluation.retrieval_data import PhonebookData

    _require_order("--fewest", arguments.fewest, "--pairs", arguments.pairs)
    return PhonebookData(
        arguments.pairs,
        arguments.fewest,
        arguments.seed,
        load_prompt("phonebook", arguments.prompts),
    ).examples(arguments.count)


def _require_order(low_name: str, low: int | None, high_name: str, high: int) -> None:
    if low is not None and not 1 <= low <= high:
        raise UserError(f"{low_name} is {low}: it must be between 1 and {high_name} ({high})")


if __name__ == "__main__":
    run_command(main)
