"""Passkey retrieval (Samba, arXiv 2406.07522, section 3.3): a random key in filler text.

7 lengths × 11 depths × 5 keys = 385 cases; greedy; the key must come exactly.
"""

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from samba_megatron.data.tokenizer import Tokenizer
from samba_megatron.evaluation.prompts import PasskeyPrompt
from samba_megatron.evaluation.reading import continue_greedily
from samba_megatron.evaluation.subject import Subject
from samba_megatron.platform.errors import UserError

LENGTHS = tuple(4096 * 2**power for power in range(7))
_DIGITS = 5


@dataclass(frozen=True)
class PasskeyCase:
    """One key at one place."""

    length: int
    """Tokens of the prompt, exactly."""
    depth: float
    """Where the key stands: 0 at the start of the filler, 1 at its end."""
    number: int

    @property
    def name(self) -> str:
        """What the result is kept under."""
        return f"passkey/{self.length}/{self.depth:g}/{self.number}"


def make_key(seed: str) -> str:
    """A key of five digits, always the same for a seed."""
    return str(random.Random(seed).randrange(10 ** (_DIGITS - 1), 10**_DIGITS))


def build_passkey(
    prompt: PasskeyPrompt, tokenizer: Tokenizer, key: str, depth: float, length: int
) -> list[int]:
    """The tokens of a prompt, exactly so many.

    Raises:
        UserError: the pieces alone are longer.
    """
    intro, question = tokenizer.encode(prompt.intro), tokenizer.encode(prompt.question)
    statement = tokenizer.encode(prompt.statement.replace("{key}", key))
    filler = tokenizer.encode(prompt.filler)
    room = length - len(intro) - len(statement) - len(question)
    if room < 0 or not filler:
        raise UserError(
            f"a passkey prompt of {length} tokens has no room for its {length - room} tokens of "
            "intro, key and question: take a larger length"
        )
    text = filler * (room // len(filler) + 1)
    before = min(round(depth * room / len(filler)), room // len(filler)) * len(filler)
    return intro + text[:before] + statement + text[: room - before] + question


@dataclass(frozen=True)
class Passkey:
    """The suite."""

    lengths: tuple[int, ...] = LENGTHS
    depths: int = 11
    keys: int = 5
    seed: int = 1234
    batch_size: int = 5
    piece: int = 16384
    prompt: PasskeyPrompt = field(default_factory=PasskeyPrompt)

    name = "passkey"

    def settings(self) -> dict[str, Any]:
        """What decides the results."""
        content = dataclasses.asdict(self)
        return {key: content[key] for key in ("lengths", "depths", "keys", "seed", "prompt")}

    def cases(self) -> list[PasskeyCase]:
        """All cases, short ones first."""
        steps = max(self.depths - 1, 1)
        return [
            PasskeyCase(length, step / steps, number)
            for length in sorted(self.lengths)
            for step in range(self.depths)
            for number in range(self.keys)
        ]

    def batches(self, done: set[str]) -> Iterator[list[PasskeyCase]]:
        """The cases to do, those of a length together."""
        for length in sorted(self.lengths):
            left = [c for c in self.cases() if c.length == length and c.name not in done]
            for start in range(0, len(left), self.batch_size):
                yield left[start : start + self.batch_size]

    def run(self, subject: Subject, batch: list[PasskeyCase]) -> list[dict[str, Any]]:
        """Asks the model."""
        tokenizer = subject.require_tokenizer()
        keys = [make_key(f"{self.seed}/{case.name}") for case in batch]
        prompts = [
            build_passkey(self.prompt, tokenizer, key, case.depth, case.length)
            for key, case in zip(keys, batch, strict=True)
        ]
        answers = (self.prompt.completion.replace("{key}", key) for key in keys)
        longest = max(len(tokenizer.encode(answer)) for answer in answers)
        found = continue_greedily(subject.model, prompts, longest + 1, self.piece)
        records = []
        for case, key, tokens in zip(batch, keys, found, strict=True):
            text = tokenizer.decode(tokens)
            record = {"case": case.name, "length": case.length, "depth": case.depth, "key": key}
            records.append({**record, "answer": text, "correct": first_number(text) == key})
        return records

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Accuracy by length, and by length and depth; by length the digits that are right, in
        their places, a tenth of which guessing would get."""
        by_length = {length: _accuracy(records, length=length) for length in sorted(self.lengths)}
        depths = sorted({case.depth for case in self.cases()})
        cells = {
            length: {f"{d:g}": _accuracy(records, length=length, depth=d) for d in depths}
            for length in sorted(self.lengths)
        }
        digits = {
            length: _mean([_digits(r) for r in records if r["length"] == length])
            for length in sorted(self.lengths)
        }
        return {"accuracy": by_length, "accuracy_by_depth": cells, "digits": digits}


def first_number(text: str) -> str | None:
    """The number that a continuation begins with, whole; None: it begins with something else."""
    match = re.match(r"\s*(\d+)", text)
    return match[1] if match else None


def _digits(record: dict[str, Any]) -> float:
    """The share of a key's digits that the answer's number has in their places."""
    key, number = record["key"], first_number(record["answer"]) or ""
    return sum(a == b for a, b in zip(number, key, strict=False)) / len(key)


def _accuracy(records: list[dict[str, Any]], **where: Any) -> float | None:
    """The share of correct answers."""
    return _mean(
        [
            record["correct"]
            for record in records
            if all(record[name] == value for name, value in where.items())
        ]
    )


def _mean(values: list[float]) -> float | None:
    """None: nothing was asked."""
    return sum(values) / len(values) if values else None
