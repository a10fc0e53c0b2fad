"""Perplexity by length of the context (Samba, arXiv 2406.07522, section 3).

A stream of documents is cut into consecutive blocks, one token longer than the longest context. A
block is read once, in pieces; the first 4096 positions give the losses of context 4096, and so on.
The perplexity of a length is exp(mean loss over all its positions and blocks).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_megatron.data.tokenizer import Tokenizer
from samba_megatron.evaluation.reading import token_losses
from samba_megatron.evaluation.subject import Subject
from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LENGTHS = (4096, 8192, 16384)


@dataclass(frozen=True)
class Perplexity:
    """The suite."""

    data: str
    """Prefix of an indexed dataset, or a text file, or JSON lines with ``text``."""
    tokenizer: Tokenizer | None
    """For text."""
    lengths: tuple[int, ...] = LENGTHS
    blocks: int | None = None
    """At most; None: all that the data have."""
    text_key: str = "text"
    piece: int = 16384

    name = "perplexity"

    def settings(self) -> dict[str, Any]:
        """What decides the results."""
        return {"data": self.data, "lengths": sorted(self.lengths), "blocks": self.blocks}

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return max(self.lengths) + 1

    @cached_property
    def tokens(self) -> "npt.NDArray[np.integer[Any]]":
        """The stream, as far as the blocks need it."""
        most = None if self.blocks is None else self.blocks * self.block
        if Path(f"{self.data}.idx").exists():
            stream = _indexed(self.data)
        else:
            stream = _encoded(Path(self.data), self.text_key, self.tokenizer, most)
        if len(stream) < self.block:
            raise UserError(
                f"{self.data} has {len(stream):,} tokens, but a block of {self.block:,} is needed: "
                "give more text or smaller --lengths"
            )
        return stream

    def cases(self) -> list[int]:
        """The blocks' numbers."""
        count = len(self.tokens) // self.block
        return list(range(count if self.blocks is None else min(count, self.blocks)))

    def batches(self, done: set[str]) -> Iterator[list[int]]:
        """The blocks to do, one at a time."""
        for number in self.cases():
            if f"perplexity/{number}" not in done:
                yield [number]

    def run(self, subject: Subject, batch: list[int]) -> list[dict[str, Any]]:
        """Reads blocks; the sums of losses up to each length."""
        import numpy as np
        import torch

        vocabulary, records = subject.model.config.vocab_size, []
        for number in batch:
            start = number * self.block
            array = np.asarray(self.tokens[start : start + self.block], dtype=np.int64)
            if int(array.max()) >= vocabulary:
                raise UserError(
                    f"{self.data} holds token id {array.max()}, outside the model's vocabulary of "
                    f"{vocabulary}: give data made with its tokenizer"
                )
            losses = token_losses(subject.model, torch.from_numpy(array), self.piece)
            sums = _sums(losses, sorted(self.lengths))
            records.append({"case": f"perplexity/{number}", "loss_sums": sums})
        return records

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Perplexity by length, and of the positions between two lengths."""
        whole: dict[int, float | None] = {}
        between: dict[int, float | None] = {}
        last, sum_before = 0, 0.0
        for length in sorted(self.lengths):
            total = math.fsum(record["loss_sums"][str(length)] for record in records)
            positions = len(records)
            whole[length] = _perplexity(total, positions * length)
            between[length] = _perplexity(total - sum_before, positions * (length - last))
            last, sum_before = length, total
        return {"perplexity": whole, "perplexity_of_last_stretch": between, "blocks": len(records)}


def _perplexity(total: float, positions: int) -> float | None:
    """exp(mean loss); None: nothing was read, or it is not finite."""
    if not positions or not math.isfinite(total):
        return None
    return math.exp(min(total / positions, 700.0))


def _sums(losses: Iterator[Any], lengths: list[int]) -> dict[str, float]:
    """Sums of the first so many losses, in fp64."""
    sums, total, seen = {}, 0.0, 0
    pending = iter(lengths)
    wanted = next(pending, None)
    for part in losses:
        part, start = part.double(), 0
        while wanted is not None and seen + len(part) >= wanted:
            total += float(part[start : wanted - seen].sum())
            start = wanted - seen
            sums[str(wanted)] = total
            wanted = next(pending, None)
        total += float(part[start:].sum())
        seen += len(part)
    return sums


def _indexed(prefix: str) -> "npt.NDArray[np.integer[Any]]":
    import numpy as np

    from samba_megatron.data.indexed import bin_path, check_dataset

    info = check_dataset(prefix)
    return np.memmap(bin_path(prefix), mode="r", dtype=info.dtype)


def _encoded(
    file: Path, text_key: str, tokenizer: Tokenizer | None, most: int | None
) -> "npt.NDArray[np.integer[Any]]":
    """The tokens of text, each document closed by the end-of-document token; what is needed."""
    import numpy as np

    if not file.is_file():
        raise UserError(
            f"--data {file} is neither the prefix of a dataset (with {file}.idx) nor a file of text"
        )
    if tokenizer is None:
        raise UserError("text needs a tokenizer: name it with --tokenizer")
    parts: list[int] = []
    for text in _texts(file, text_key):
        parts += tokenizer.encode(text)
        parts.append(tokenizer.eod)
        if most is not None and len(parts) >= most:
            break
    return np.array(parts[:most], dtype=np.int64)


def _texts(file: Path, text_key: str) -> Iterator[str]:
    from samba_megatron.data.jsonl import expand_inputs, read_texts

    if ".json" in file.name:
        return read_texts(expand_inputs([str(file)]), text_key)
    try:
        return itertools.repeat(file.read_text(encoding="utf-8"), 1)
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--data {file}: {problem}") from None
