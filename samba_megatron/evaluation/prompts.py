"""The sentences that the retrieval tests are made of, all replaceable, and names for a phonebook.

Pieces begin with a space or a line's end, so that tokenizers cut there, and the pieces' tokens one
after another are the tokens of the whole text.
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_megatron.config.recipes import read_yaml
from samba_megatron.platform.errors import UserError


@dataclass(frozen=True)
class PasskeyPrompt:
    """A key in filler text, and the question for it."""

    intro: str = "A pass key is hidden in the text below. Read on and keep it in mind.\n"
    filler: str = (
        " Leaves fall in autumn. Rain comes from the west. The road goes on and on. Birds return in"
        " spring."
    )
    """Repeated as often as the length needs; the last time it may be cut."""
    statement: str = " The pass key is {key}. Do not forget it: {key} is the pass key."
    question: str = "\nWhat is the pass key? The pass key is"
    completion: str = " {key}"

    def needed(self) -> dict[str, tuple[str, ...]]:
        """The placeholders that a piece must have."""
        return {"statement": ("{key}",), "completion": ("{key}",)}


@dataclass(frozen=True)
class PhonebookPrompt:
    """Names and numbers, two of them again as examples, and a name."""

    intro: str = ""
    entry: str = "{name}: {number}\n"
    examples: str = "\n"
    """What stands between the book and the two examples."""
    query: str = "{name}:"
    completion: str = " {number}"

    def needed(self) -> dict[str, tuple[str, ...]]:
        """The placeholders that a piece must have."""
        return {
            "entry": ("{name}", "{number}"),
            "query": ("{name}",),
            "completion": ("{number}",),
        }


PROMPTS: dict[str, type[PasskeyPrompt] | type[PhonebookPrompt]] = {
    "passkey": PasskeyPrompt,
    "phonebook": PhonebookPrompt,
}


def load_prompt(kind: str, file: Path | None) -> Any:
    """The prompt of a kind, with the pieces that a YAML or JSON file replaces.

    Args:
        kind: ``passkey`` or ``phonebook``.
        file: ``passkey: {question: …}``; None: all as they are.

    Raises:
        UserError: the file cannot be read, or says what no prompt has.
    """
    if file is None:
        return PROMPTS[kind]()
    try:
        content = read_yaml(file.read_text(encoding="utf-8"), f"--prompts {file}")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--prompts {file} cannot be read: {problem}") from None
    if not isinstance(content, dict) or not set(content) <= set(PROMPTS):
        raise UserError(f"--prompts {file}: its keys must be {' or '.join(PROMPTS)}")
    pieces = content.get(kind, {})
    names = [field.name for field in dataclasses.fields(PROMPTS[kind])]
    if not isinstance(pieces, dict) or not set(pieces) <= set(names):
        raise UserError(f"--prompts {file}: {kind} has the pieces {', '.join(names)} only")
    if not all(isinstance(text, str) for text in pieces.values()):
        raise UserError(f"--prompts {file}: every piece of {kind} must be text: quote it")
    prompt = PROMPTS[kind](**pieces)
    for name, placeholders in prompt.needed().items():
        for placeholder in placeholders:
            if placeholder not in getattr(prompt, name):
                raise UserError(f"--prompts {file}: {kind}.{name} must contain {placeholder}")
    return prompt


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_FIRST = _words(
    "Ada Alan Alma Amos Anna Arthur Bella Boris Carla Cecil Clara Conrad Dana David Dora Edgar "
    "Elena Emil Emma Ernest Eva Felix Fiona Frank Gina Gustav Hanna Henry Ida Igor Irene Isaac "
    "Jana Jonas Julia Karl Karen Kurt Laura Leo Lena Louis Lucy Marcus Maria Martin Mina Moses "
    "Nadia Nora Oscar Olga Paul Petra Ralph Rosa Rudolf Sara Simon Tessa Thomas Ursula Victor Wanda"
)
_LAST = _words(
    "Abel Adler Archer Baker Bauer Becker Berg Bishop Brandt Brook Carter Castle Cooper Dale "
    "Decker Diaz Eaton Engel Fischer Ford Foster Frost Garcia Gibson Graf Grant Hale Harper "
    "Hart Hill Holt Hunter Jansen Keller King Klein Lang Larsen Lopez Mason Mayer Meyer Moore "
    "Moreno Nash Novak Olsen Parker Peters Porter Reed Richter Rivera Rossi Sharp Silva Stone "
    "Swift Torres Vogel Wagner Walker Weber Young"
)
# There are so many full names.
MOST_NAMES = len(_FIRST) * len(_LAST)


def full_names(count: int, chance: random.Random) -> list[str]:
    """So many different full names (``MOST_NAMES`` at most), in an order of chance."""
    numbers = chance.sample(range(MOST_NAMES), count)
    return [f"{_FIRST[n % len(_FIRST)]} {_LAST[n // len(_FIRST)]}" for n in numbers]
