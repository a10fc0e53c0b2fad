"""Documents to train retrieval on: passkeys in filler, phonebooks; the same for the same seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from samba_megatron.data.tokenizer import Tokenizer
from samba_megatron.evaluation.passkey import build_passkey, make_key
from samba_megatron.evaluation.phonebook import build_phonebook
from samba_megatron.evaluation.prompts import PasskeyPrompt, PhonebookPrompt

Example = dict[str, str]
"""``prompt`` and ``completion``."""


@dataclass(frozen=True)
class PasskeyData:
    """Passkey documents, whose seeds are not those of the evaluation."""

    tokenizer: Tokenizer
    length: int
    """Tokens of a document, its completion and end-of-document token included; hardly fewer."""
    shortest: int | None = None
    """Lengths are drawn, evenly on a logarithmic scale, between this and ``length``."""
    seed: int = 1234
    prompt: PasskeyPrompt = field(default_factory=PasskeyPrompt)

    def examples(self, count: int) -> Iterator[Example]:
        """So many documents."""
        for number in range(count):
            name = f"train/{self.seed}/{number}"
            yield self._example(make_key(name), random.Random(f"{name}/place"))

    def _example(self, key: str, chance: random.Random) -> Example:
        low = self.length if self.shortest is None else self.shortest
        length = round(low * (self.length / low) ** chance.random())
        completion = self.prompt.completion.replace("{key}", key)
        room = length - len(self.tokenizer.encode(completion)) - 1
        depth = chance.random()
        # The whole text may have another number of tokens than its pieces together.
        for fewer in range(room):
            ids = build_passkey(self.prompt, self.tokenizer, key, depth, room - fewer)
            text = self.tokenizer.decode(ids)
            if len(self.tokenizer.encode(text + completion)) < length:
                return {"prompt": text, "completion": completion}
        raise AssertionError("a text shorter by its own length fits")


@dataclass(frozen=True)
class PhonebookData:
    """Phonebook documents, whose seeds are not those of the evaluation."""

    pairs: int
    """Pairs of a book."""
    fewest: int | None = None
    """The number of pairs is drawn between this and ``pairs``."""
    seed: int = 1234
    prompt: PhonebookPrompt = field(default_factory=PhonebookPrompt)

    def examples(self, count: int) -> Iterator[Example]:
        """So many documents."""
        for number in range(count):
            name = f"train/{self.seed}/{number}"
            low = self.pairs if self.fewest is None else self.fewest
            pairs = random.Random(f"{name}/size").randint(low, self.pairs)
            text = build_phonebook(self.prompt, pairs, name)
            completion = self.prompt.completion.replace("{number}", text.number) + "\n"
            yield {"prompt": text.prompt, "completion": completion}
