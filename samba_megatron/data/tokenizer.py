"""The vocabulary: trains a byte-level BPE and loads any Hugging Face fast tokenizer.

A tokenizer is a folder with ``tokenizer.json`` and ``tokenizer_config.json``, which Hugging Face's
``AutoTokenizer`` loads as it is. Loading it here needs only the ``tokenizers`` package, so that
commands that count or check tokens start at once.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from samba_megatron.data.publish import atomic_write
from samba_megatron.platform.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING)
"""The special tokens of a trained tokenizer, ids 0 and 1."""

_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer: text to ids and back."""

    path: Path
    """The ``tokenizer.json`` it came from."""
    identity: str
    """SHA-256 of ``tokenizer.json``: equal identities give equal tokens."""
    eod: int
    """Id of the token that ends a document (the tokenizer's EOS)."""
    backend: tokenizers.Tokenizer
    """The Hugging Face tokenizer underneath."""

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special and added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What Megatron's dataset caches may depend on."""
        return {"identity": self.identity, "eod": self.eod}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens spelled out in it become ids, none is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer from its folder (or from a ``tokenizer.json`` in it).

    Raises:
        UserError: the files are missing or unreadable, or there is no EOS token.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {file} ({error.strerror}): give a folder that holds "
            "tokenizer.json, such as tools/train_tokenizer.py writes"
        ) from error
    try:
        backend = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises plain Exception for every defect
        raise UserError(f"{file} is not a Hugging Face tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(file, hashlib.sha256(content).hexdigest(), _eod(backend, file), backend)


def _eod(backend: tokenizers.Tokenizer, file: Path) -> int:
    """Id of the EOS token that the tokenizer's configuration names."""
    name = _named_eos(file.parent)
    name = END_OF_DOCUMENT if name is None else name
    token = backend.token_to_id(name)
    if token is None:
        raise UserError(
            f"the tokenizer {file.parent} has no token {name!r} to end documents with: name an "
            'existing one as "eos_token" in its tokenizer_config.json'
        )
    return token


def _named_eos(folder: Path) -> str | None:
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        if named is not None:
            return named["content"] if isinstance(named, dict) else str(named)
    return None


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: Path, show_progress: bool = True
) -> Tokenizer:
    """Trains a byte-level BPE (GPT-2's splitting, every text encodable) and saves its folder.

    Args:
        texts: the documents to learn from, read once.
        vocab_size: size of the vocabulary, the 256 bytes and the special tokens included.
        output: folder to write ``tokenizer.json`` and ``tokenizer_config.json`` to.
        show_progress: draw progress bars on a terminal while merging.

    Returns:
        The tokenizer, smaller than ``vocab_size`` if the texts have too few repeated pairs.

    Raises:
        UserError: ``vocab_size`` cannot hold all bytes, there is no text, or ``output`` cannot be
            written.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and the special tokens alone "
            f"need {_SMALLEST_VOCABULARY}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_not_nothing(texts), trainer=trainer)
    _save(backend, output)
    return load_tokenizer(output)


def _not_nothing(texts: Iterable[str]) -> Iterator[str]:
    """Passes the texts on; refuses to end without one."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise UserError("there is no text to train a tokenizer on: check the input files")


def _save(backend: tokenizers.Tokenizer, folder: Path) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "tokenizer_config.json") as stream:
            json.dump(config, stream, indent=2)
        with atomic_write(folder / "tokenizer.json") as stream:
            stream.write(backend.to_str(pretty=True))
    except OSError as error:
        raise UserError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error
