"""The vocabulary: trains a byte-level BPE and loads any Hugging Face fast tokenizer.

A tokenizer is a folder with ``tokenizer.json`` and ``tokenizer_config.json``, which Hugging Face's
``AutoTokenizer`` loads as it is. SentencePiece models and tiktoken files are turned into one when
they are loaded, and written as one into exports. Loading needs only the ``tokenizers`` package, so
that commands that count or check tokens start at once.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

END_OF_DOCUMENT = "<|endoftext|>"
PADDING = "<|padding|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, PADDING)
"""The special tokens of a trained tokenizer, ids 0 and 1."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

_TIKTOKEN: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        {END_OF_DOCUMENT: 50256},
    ),
    "cl100k_base": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {
            END_OF_DOCUMENT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {END_OF_DOCUMENT: 199999, "<|endofprompt|>": 200018},
    ),
}
"""How the published encodings split text, and their special tokens: not in the rank files."""

_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer: text to ids and back."""

    path: Path
    """The file it came from."""
    identity: str
    """SHA-256 of that file: equal identities give equal tokens."""
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

    def save(self, folder: Path) -> None:
        """Writes it as a folder that ``AutoTokenizer`` loads, whatever kind of file it came from.

        Raises:
            UserError: the folder cannot be written.
        """
        _save(self.backend, folder, {"eos_token": self.backend.id_to_token(self.eod)})


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        source: a folder that ``save_pretrained`` wrote, a ``tokenizer.json``, a SentencePiece
            ``.model`` (or a folder with ``tokenizer.model``), a ``.tiktoken`` file of a published
            encoding, or the name of a tokenizer on the Hugging Face hub or in its cache.

    Raises:
        UserError: the files are missing or unreadable, or there is no EOS token.
    """
    file = _find(source)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {file} ({error.strerror}): give a folder that holds "
            "tokenizer.json, such as tools/train_tokenizer.py writes"
        ) from error
    backend, eos = _parse(file, content)
    backend.no_truncation()
    backend.no_padding()
    eod = _eod(backend, file, eos)
    return Tokenizer(file, hashlib.sha256(content).hexdigest(), eod, backend)


def _find(source: str | Path) -> Path:
    """The file that holds the vocabulary."""
    path = Path(source)
    if path.is_dir():
        candidates = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        return next((file for file in candidates if file.exists()), candidates[0])
    if path.exists() or path.suffix or not _HUB_NAME.fullmatch(str(source)):
        return path
    return _from_hub(str(source))


def _from_hub(name: str) -> Path:
    """A tokenizer by name: from Hugging Face's cache, or its hub where that can be reached."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        for beside in ("tokenizer_config.json", "special_tokens_map.json"):
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(name, beside)
        return Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:  # of the network, of the hub, of the name: no common type
        raise UserError(
            f"cannot read the tokenizer {name}: no such folder or file, and neither the cache nor "
            f"the hub of Hugging Face gives it ({type(error).__name__})"
        ) from error


def _parse(file: Path, content: bytes) -> tuple[tokenizers.Tokenizer, str | None]:
    """The Hugging Face tokenizer that a file describes, and the end-of-text that it implies."""
    if file.suffix == ".tiktoken":
        return _from_tiktoken(file), END_OF_DOCUMENT
    try:
        if file.suffix == ".model":
            return _from_sentencepiece(content), "</s>"
        return tokenizers.Tokenizer.from_buffer(content), None
    except Exception as error:  # the libraries raise plain Exception for every defect
        kind = "SentencePiece model" if file.suffix == ".model" else "Hugging Face tokenizer"
        raise UserError(f"{file} is not a {kind} that can be used: {error}") from error


def _from_sentencepiece(content: bytes) -> tokenizers.Tokenizer:
    """Turns a model into a Hugging Face tokenizer of the same tokens and, back, the same text."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    from tokenizers import decoders

    described = sentencepiece_to_tokenizer_json(content)
    backend = tokenizers.Tokenizer.from_str(described)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if any(
        step["type"] == "Prepend" for step in json.loads(described)["normalizer"]["normalizers"]
    ):
        back.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(back)
    return backend


def _from_tiktoken(file: Path) -> tokenizers.Tokenizer:
    """Turns a rank file of a published encoding into the same Hugging Face tokenizer."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoding = _TIKTOKEN.get(file.stem)
    if encoding is None:
        raise UserError(
            f"{file}: a .tiktoken file does not say how to split text, only its name does: call "
            f"it one of {', '.join(f'{name}.tiktoken' for name in _TIKTOKEN)}"
        )
    pattern, special = encoding
    try:
        vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(file))
    except Exception as error:  # as above
        raise UserError(f"{file} is not a tiktoken rank file: {error}") from error
    # In the vocabulary itself: the ids of special tokens do not follow on those of the others.
    backend = tokenizers.Tokenizer(models.BPE(vocab | special, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_alone])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def _eod(backend: tokenizers.Tokenizer, file: Path, implied: str | None) -> int:
    """Id of the EOS token: what the configuration beside the file names, or the kind implies."""
    name = _named_eos(file.parent) if file.suffix == ".json" else implied
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
    texts: Iterable[str],
    vocab_size: int,
    output: Path,
    show_progress: bool = True,
    split_digits: bool = False,
) -> Tokenizer:
    """Trains a byte-level BPE (GPT-2's splitting, every text encodable) and saves its folder.

    Args:
        texts: the documents to learn from, read once.
        vocab_size: size of the vocabulary, the 256 bytes and the special tokens included.
        output: folder to write ``tokenizer.json`` and ``tokenizer_config.json`` to.
        show_progress: draw progress bars on a terminal while merging.
        split_digits: every digit is a token of its own, as in Llama's tokenizers.

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
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = split
    if split_digits:
        # Only while learning: where no two digits ever stood together, none are merged later.
        alone = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([alone, split])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_not_nothing(texts), trainer=trainer)
    backend.pre_tokenizer = split
    ends = dict.fromkeys(("bos_token", "eos_token"), END_OF_DOCUMENT)
    _save(backend, output, {**ends, "pad_token": PADDING})
    return load_tokenizer(output)


def _not_nothing(texts: Iterable[str]) -> Iterator[str]:
    """Passes the texts on; refuses to end without one."""
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise UserError("there is no text to train a tokenizer on: check the input files")


def _save(backend: tokenizers.Tokenizer, folder: Path, special: Mapping[str, str | None]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
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
