"""Trains a byte-level BPE tokenizer on JSON lines and saves it for Hugging Face's AutoTokenizer."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from samba_megatron.data.jsonl import expand_inputs, read_texts
from samba_megatron.data.tokenizer import train_tokenizer
from samba_megatron.platform.errors import run_command


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, help="JSON lines files or globs (.gz and .zst too)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=16384, help="all tokens, bytes and specials included"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the tokenizer")
    parser.add_argument("--text-key", default="text", help="the key that holds the text")
    parser.add_argument(
        "--max-megabytes", type=float, help="learn from the first MB of text only (default: all)"
    )
    parser.add_argument(
        "--split-digits", action="store_true", help="every digit is a token, as Llama's"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    texts = read_texts(expand_inputs(arguments.input), arguments.text_key)
    tokenizer = train_tokenizer(
        _reported(texts, arguments.max_megabytes),
        arguments.vocab_size,
        arguments.output,
        split_digits=arguments.split_digits,
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        print(
            f"warning: the text has too few repeated pairs for {arguments.vocab_size} tokens",
            file=sys.stderr,
        )
    print(
        f"{arguments.output}: {tokenizer.vocab_size:,} tokens, end of document {tokenizer.eod}, "
        f"trained in {time.monotonic() - started:.1f} s"
    )


def _reported(texts: Iterable[str], max_megabytes: float | None) -> Iterator[str]:
    """Passes the texts on up to a size, saying from time to time how many megabytes they are."""
    limit = float("inf") if max_megabytes is None else max_megabytes * 1e6
    size, said = 0, 0.0
    for text in texts:
        size += len(text.encode())
        if size > limit:
            break
        yield text
        if size >= said + 100e6:
            said = size
            print(f"read {size / 1e6:.0f} MB", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
