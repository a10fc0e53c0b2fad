"""Batches of documents to token ids: the fast engine, the reference engine, and which to trust.

Hugging Face's ``tokenizers`` defines what the right tokens are. ``gigatoken`` computes the same an
order of magnitude faster, but only for the kinds of tokenizer that it knows; it is used after it
has given equal tokens for a sample of the user's own documents, and it is checked again on a
document now and then, or on all of them (``--verify``).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from samba_megatron.data.indexed import token_dtype
from samba_megatron.data.tokenizer import Tokenizer

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]
Encoder = Callable[[Sequence[bytes]], tuple[Ids, Lengths]]
"""Texts (UTF-8) to the ids of all of them one after another, and the number of ids of each."""

_SPOT_CHECK_BYTES = 8_192
"""Of the document that is checked now and then, at most: a few milliseconds."""
_SPOT_CHECK_EVERY = 64 << 20
"""Text between two checks: their cost is below one percent."""
_COPY_SINGLY = 256
"""Tokens a document from which copying each is faster than computing where all of them go."""
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Engine(StrEnum):
    """What computes the tokens."""

    GIGATOKEN = "gigatoken"
    HUGGINGFACE = "huggingface"


@dataclass(frozen=True)
class SampleDocument:
    """A document to compare the engines on."""

    origin: str
    """Where it is, for a person: file and line."""
    text: bytes


def make_encoder(tokenizer: Tokenizer, engine: Engine, threads: bool = False) -> Encoder:
    """The function that encodes with ``engine``.

    Gigatoken runs on the calling thread, or on all cores with ``threads``; Hugging Face on all
    cores, unless the environment says ``TOKENIZERS_PARALLELISM=false``.

    Raises:
        Exception: gigatoken does not know this kind of tokenizer.
    """
    if engine is Engine.HUGGINGFACE:
        return _huggingface_encoder(tokenizer)
    return _gigatoken_encoder(tokenizer, threads)


def _huggingface_encoder(tokenizer: Tokenizer) -> Encoder:
    def encode(texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        encodings = tokenizer.backend.encode_batch_fast(
            [text.decode() for text in texts], add_special_tokens=False
        )
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        return np.concatenate([*ids, np.empty(0, np.uint32)]), lengths

    return encode


def _gigatoken_encoder(tokenizer: Tokenizer, threads: bool = False) -> Encoder:
    import gigatoken

    if tokenizer.path.suffix == ".tiktoken":
        backend = gigatoken.Tokenizer.from_tiktoken(tokenizer.path)
    else:
        backend = gigatoken.Tokenizer.from_json(tokenizer.backend.to_str())

    def encode(texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        rows = backend.encode_batch(list(texts), parallel=threads).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)

    return encode


def choose_engine(
    tokenizer: Tokenizer, sample: Iterable[SampleDocument]
) -> tuple[Engine, str | None]:
    """Gigatoken if it agrees with Hugging Face on the sample, else Hugging Face and the reason.

    Beside the sample, texts that are hard for tokenizers are compared, such as the special tokens
    spelled out.
    """
    documents = [*_probes(tokenizer), *sample]
    try:
        fast = make_encoder(tokenizer, Engine.GIGATOKEN)
        ids, lengths = fast([document.text for document in documents])
    except Exception as error:  # gigatoken's own errors have no common type
        return Engine.HUGGINGFACE, f"gigatoken cannot run this tokenizer ({error})"
    for document, found in zip(documents, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        if found.tolist() != tokenizer.encode(document.text.decode()):
            return Engine.HUGGINGFACE, f"gigatoken gives other tokens for {document.origin}"
    return Engine.GIGATOKEN, None


def _probes(tokenizer: Tokenizer) -> list[SampleDocument]:
    """Short texts on which tokenizers tend to differ."""
    texts = [
        "a\x00b\x7f\x85\r\n\r\n \t\u2028\u00a0\u3000x",
        " " * 99 + "\n" * 99 + "x  \n  y" + "1234567890" * 9,
        "don't DON'T I'LL we'Ve e\u0301 \u0130\u0131\u017f\u212a \ufeff\ufffd",
        "日本語 العربية हिन्दी 👩\u200d👩\u200d👧 \U0001d4d0",
    ]
    for added in tokenizer.backend.get_added_tokens_decoder().values():
        token = added.content
        texts += [token, f"a{token}b {token} {token}{token}\n{token}", token[:-1]]
    return [SampleDocument(f"the probe text {text!r:.40}", text.encode()) for text in texts if text]


@dataclass
class TokenizedDocuments:
    """The tokens of some documents, ready to write."""

    tokens: npt.NDArray[Any]
    """Ids of all documents, one after another."""
    lengths: Lengths
    """Ids of each document ``[documents]``."""
    emptied: list[int]
    """Indices of the texts of which the tokenizer left nothing; they are not documents."""
    disagreement: int | None = None
    """Index of a text on which the engines differ, if a check found one."""


class BatchTokenizer:
    """Turns batches of texts into tokens; one lives in each process.

    Gigatoken remembers each word for ever, which on text that hardly repeats a word takes
    gigabytes. When the process has grown beyond ``memory_bytes``, it is started afresh.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        engine: Engine,
        append_eod: bool,
        verify: bool = False,
        threads: bool = False,
        memory_bytes: int = 480 << 20,
    ) -> None:
        self._tokenizer = tokenizer
        self._engine = engine
        self._threads = threads
        self._encode = make_encoder(tokenizer, engine, threads)
        self._verify = verify
        self._append_eod = append_eod
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._memory_bytes = memory_bytes
        self._until_check = 0

    def __call__(self, texts: list[bytes]) -> TokenizedDocuments:
        """The texts' tokens, each closed by the end of document if so chosen."""
        self._forget_words_if_large()
        ids, lengths = self._encode(texts)
        disagreement = self._disagreement(texts, ids, lengths)
        emptied = np.flatnonzero(lengths == 0).tolist() if len(lengths) else []
        lengths = lengths[lengths > 0] if emptied else lengths
        if self._append_eod and len(lengths):
            tokens, lengths = self._with_eod(ids, lengths)
        else:
            tokens = ids.astype(self._dtype)
        return TokenizedDocuments(tokens, lengths, emptied, disagreement)

    def _forget_words_if_large(self) -> None:
        if self._engine is Engine.GIGATOKEN and _resident_bytes() > self._memory_bytes:
            del self._encode
            self._encode = make_encoder(self._tokenizer, self._engine, self._threads)

    def _disagreement(self, texts: list[bytes], ids: Ids, lengths: Lengths) -> int | None:
        """Compares all documents, or now and then the beginning of one; which of them differs."""
        if self._engine is Engine.HUGGINGFACE:
            return None
        if self._verify:
            return self._first_difference(texts, ids, lengths)
        self._until_check -= sum(map(len, texts))
        if self._until_check > 0:
            return None
        self._until_check = _SPOT_CHECK_EVERY
        if not texts:
            return None
        index = len(texts) // 2
        text = beginning(texts[index], _SPOT_CHECK_BYTES)
        found, _ = self._encode([text])
        return None if found.tolist() == self._tokenizer.encode(text.decode()) else index

    def _first_difference(self, texts: list[bytes], ids: Ids, lengths: Lengths) -> int | None:
        ends = np.cumsum(lengths)
        for index, text in enumerate(texts):
            found = ids[ends[index] - lengths[index] : ends[index]].tolist()
            if found != self._tokenizer.encode(text.decode()):
                return index
        return None

    def _with_eod(self, ids: Ids, lengths: Lengths) -> tuple[npt.NDArray[Any], Lengths]:
        """Puts the end of document after each document."""
        longer = lengths + 1
        ends = np.cumsum(longer)
        tokens = np.empty(len(ids) + len(lengths), dtype=self._dtype)
        if len(ids) > _COPY_SINGLY * len(lengths):
            position = 0
            for length, end in zip(lengths.tolist(), ends.tolist(), strict=True):
                tokens[end - 1 - length : end - 1] = ids[position : position + length]
                position += length
        else:
            keep = np.ones(len(tokens), dtype=bool)
            keep[ends - 1] = False
            tokens[keep] = ids
        tokens[ends - 1] = self._tokenizer.eod
        return tokens, longer


def beginning(text: bytes, size: int) -> bytes:
    """At most the first ``size`` bytes of a text, ending with a whole character."""
    return text if len(text) <= size else text[:size].decode(errors="ignore").encode()


def _resident_bytes() -> int:
    """Memory that this process holds."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * _PAGE
