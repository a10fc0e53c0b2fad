"""Blocks of documents to token ids: the fast engine, the reference engine, and which one to trust.

Hugging Face's ``tokenizers`` defines what the right tokens are. ``gigatoken`` computes the same an
order of magnitude faster, but only for the kinds of tokenizer that it knows; it is used after it
has given equal tokens for a sample of the user's own documents, and it is checked again on one
document of every block.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from samba_megatron.data.indexed import token_dtype
from samba_megatron.data.jsonl import Defect, Issue, parse_block
from samba_megatron.data.tokenizer import Tokenizer

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]
Encoder = Callable[[Sequence[bytes]], tuple[Ids, Lengths]]
"""Texts (UTF-8) to the ids of all of them one after another, and the number of ids of each."""

_SPOT_CHECK_BYTES = 16_384
"""The document checked in each block is at most this long: the check costs a few milliseconds."""


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


@dataclass
class TokenizedBlock:
    """The tokens of a block of lines, ready to write."""

    tokens: npt.NDArray[Any]
    """Ids of all documents, one after another."""
    lengths: Lengths
    """Ids of each document ``[documents]``."""
    issues: list[Issue]
    lines: int
    blank_lines: int
    block_bytes: int
    """Bytes of the lines."""
    text_bytes: int
    """UTF-8 bytes of the documents."""
    disagreement: int | None = None
    """The line of a document on which the engines differ, if the spot check found one."""


def make_encoder(tokenizer: Tokenizer, engine: Engine) -> Encoder:
    """The function that encodes with ``engine``.

    Gigatoken runs on the calling thread; Hugging Face on all cores, unless the environment says
    ``TOKENIZERS_PARALLELISM=false``.

    Raises:
        Exception: gigatoken does not know this kind of tokenizer.
    """
    if engine is Engine.HUGGINGFACE:
        return _huggingface_encoder(tokenizer)
    return _gigatoken_encoder(tokenizer)


def _huggingface_encoder(tokenizer: Tokenizer) -> Encoder:
    def encode(texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        encodings = tokenizer.backend.encode_batch_fast(
            [text.decode() for text in texts], add_special_tokens=False
        )
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        return np.concatenate([*ids, np.empty(0, np.uint32)]), lengths

    return encode


def _gigatoken_encoder(tokenizer: Tokenizer) -> Encoder:
    import gigatoken

    backend = gigatoken.Tokenizer.from_json(tokenizer.backend.to_str())

    def encode(texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        rows = backend.encode_batch(list(texts), parallel=False).layout
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


class BlockTokenizer:
    """Turns blocks of JSON lines into tokens; one lives in each worker."""

    def __init__(
        self, tokenizer: Tokenizer, engine: Engine, text_key: str, append_eod: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = make_encoder(tokenizer, engine)
        self._spot_check = engine is not Engine.HUGGINGFACE
        self._text_key = text_key
        self._append_eod = append_eod
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, block: bytes) -> TokenizedBlock:
        """The block's documents as tokens; what is wrong with its other lines is in ``issues``."""
        parsed = parse_block(block, self._text_key)
        ids, lengths = self._encode(parsed.texts)
        result = TokenizedBlock(
            tokens=ids.astype(self._dtype),
            lengths=lengths,
            issues=parsed.issues,
            lines=parsed.lines,
            blank_lines=parsed.blank_lines,
            block_bytes=len(block),
            text_bytes=sum(map(len, parsed.texts)),
        )
        if self._spot_check:
            result.disagreement = self._disagreement(parsed.texts, parsed.text_lines, ids, lengths)
        if self._append_eod:
            _append_to_each(result, self._tokenizer.eod)
        else:
            _drop_empty(result, parsed.text_lines)
        return result

    def _disagreement(
        self, texts: list[bytes], lines: list[int], ids: Ids, lengths: Lengths
    ) -> int | None:
        """Checks one document of the block; its line if the engines differ on it."""
        ends = np.cumsum(lengths)
        middle = len(texts) // 2
        for index in [*range(middle, len(texts)), *range(middle)]:
            if len(texts[index]) <= _SPOT_CHECK_BYTES:
                expected = self._tokenizer.encode(texts[index].decode())
                found = ids[ends[index] - lengths[index] : ends[index]].tolist()
                return None if found == expected else lines[index]
        return None


def _append_to_each(block: TokenizedBlock, token: int) -> None:
    """Puts ``token`` after each document."""
    lengths = block.lengths + 1
    last = np.cumsum(lengths) - 1
    tokens = np.full(len(block.tokens) + len(lengths), token, dtype=block.tokens.dtype)
    keep = np.ones(len(tokens), dtype=bool)
    keep[last] = False
    tokens[keep] = block.tokens
    block.tokens, block.lengths = tokens, lengths


def _drop_empty(block: TokenizedBlock, text_lines: list[int]) -> None:
    """Turns documents that the tokenizer's normalizer made empty into issues."""
    empty = np.flatnonzero(block.lengths == 0)
    if len(empty):
        block.issues += [Issue(text_lines[index], Defect.EMPTY) for index in empty]
        block.issues.sort(key=lambda issue: issue.line)
        block.lengths = block.lengths[block.lengths > 0]
