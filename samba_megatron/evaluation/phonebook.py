"""Phonebook look-up (Samba, arXiv 2406.07522): the number of a name, out of a long list.

Names with numbers of ten digits, two of the entries again as examples, then a name. Greedy, 20 new
tokens, the first line must be the number.
"""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from samba_megatron.evaluation.prompts import MOST_NAMES, PhonebookPrompt, full_names
from samba_megatron.evaluation.reading import continue_greedily
from samba_megatron.evaluation.subject import Subject
from samba_megatron.platform.errors import UserError

PAIRS = (20, 40, 80, 160, 240, 320, 400, 480, 960, 1850)
_EXAMPLES = 2
_NEW_TOKENS = 20


class PhonebookText(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    number: str


@dataclass(frozen=True)
class PhonebookCase:
    """One book and one name."""

    pairs: int
    number: int

    @property
    def name(self) -> str:
        """What the result is kept under."""
        return f"phonebook/{self.pairs}/{self.number}"


def build_phonebook(prompt: PhonebookPrompt, pairs: int, seed: str) -> PhonebookText:
    """A book of so many pairs, always the same for a seed.

    Raises:
        UserError: there are too few pairs or too few names.
    """
    _require_size(pairs)
    chance = random.Random(seed)
    names = full_names(pairs, chance)
    numbers = [f"{chance.randrange(10**10):010d}" for _ in names]
    entries = [_entry(prompt, *pair) for pair in zip(names, numbers, strict=True)]
    *examples, asked = chance.sample(range(pairs), _EXAMPLES + 1)
    text = prompt.intro + "".join(entries) + prompt.examples
    text += "".join(entries[example] for example in examples)
    return PhonebookText(text + prompt.query.replace("{name}", names[asked]), numbers[asked])


def _require_size(pairs: int) -> None:
    if not _EXAMPLES < pairs <= MOST_NAMES:
        raise UserError(
            f"a phonebook of {pairs} pairs cannot be made: take {_EXAMPLES + 1} to {MOST_NAMES}"
        )


def _entry(prompt: PhonebookPrompt, name: str, number: str) -> str:
    return prompt.entry.replace("{name}", name).replace("{number}", number)


@dataclass(frozen=True)
class Phonebook:
    """The suite."""

    pairs: tuple[int, ...] = PAIRS
    samples: int = 128
    seed: int = 1234
    batch_size: int = 8
    piece: int = 16384
    prompt: PhonebookPrompt = field(default_factory=PhonebookPrompt)

    name = "phonebook"

    def settings(self) -> dict[str, Any]:
        """What decides the results."""
        content = dataclasses.asdict(self)
        return {key: content[key] for key in ("pairs", "samples", "seed", "prompt")}

    def cases(self) -> list[PhonebookCase]:
        """All cases, small books first; a UserError where a size cannot be."""
        for pairs in self.pairs:
            _require_size(pairs)
        return [PhonebookCase(p, n) for p in sorted(self.pairs) for n in range(self.samples)]

    def batches(self, done: set[str]) -> Iterator[list[PhonebookCase]]:
        """The cases to do, those of a size together."""
        for pairs in sorted(self.pairs):
            left = [c for c in self.cases() if c.pairs == pairs and c.name not in done]
            for start in range(0, len(left), self.batch_size):
                yield left[start : start + self.batch_size]

    def run(self, subject: Subject, batch: list[PhonebookCase]) -> list[dict[str, Any]]:
        """Asks the model."""
        tokenizer = subject.require_tokenizer()
        texts = [
            build_phonebook(self.prompt, case.pairs, f"{self.seed}/{case.name}") for case in batch
        ]
        prompts = [tokenizer.encode(text.prompt) for text in texts]
        found = continue_greedily(subject.model, prompts, _NEW_TOKENS, self.piece)
        return [
            {
                "case": case.name,
                "pairs": case.pairs,
                "length": len(tokens),
                "number": text.number,
                "answer": (answer := tokenizer.decode(new)),
                "correct": first_line(answer) == text.number,
            }
            for case, text, tokens, new in zip(batch, texts, prompts, found, strict=True)
        ]

    def summary(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        """Accuracy and mean length in tokens by number of pairs."""
        accuracy: dict[int, float | None] = {}
        lengths: dict[int, float | None] = {}
        for pairs in sorted(self.pairs):
            found = [record for record in records if record["pairs"] == pairs]
            count = len(found)
            accuracy[pairs] = sum(r["correct"] for r in found) / count if count else None
            lengths[pairs] = sum(r["length"] for r in found) / count if count else None
        return {"accuracy": accuracy, "tokens": lengths}


def first_line(text: str) -> str:
    """The first line of a continuation, without spaces around it."""
    return text.lstrip(" ").split("\n", 1)[0].strip()
