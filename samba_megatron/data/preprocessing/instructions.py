"""Prompts with completions, or conversations, to a dataset with a loss mask.

The loss counts on completions, on the assistant's turns and on the end of a document. Pieces are
tokenized one by one, as they are when the model is used: a prompt's tokens do not depend on what
follows. Such data are small beside a corpus: one process does all.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samba_megatron.data.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from samba_megatron.data.jsonl import (
    Defect,
    HashingReader,
    expand_inputs,
    open_input,
    parse_object,
    read_blocks,
    split_lines,
)
from samba_megatron.data.loss_masks import MASK_DTYPE, mask_prefix
from samba_megatron.data.manifest import (
    DatasetRecord,
    InputRecord,
    Manifest,
    manifest_path,
    write_manifest,
)
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

ASSISTANT = "assistant"
TURN_FORMAT = "{role}: {content}\n"
_BLOCK_BYTES = 4 << 20

Piece = tuple[str, bool]
"""A stretch of text, and whether the loss counts there."""


@dataclass(frozen=True)
class InstructionOptions:
    """What to read, and where the dataset goes."""

    inputs: list[str]
    """JSON lines files or globs."""
    tokenizer: str
    output_prefix: str
    prompt_key: str | None = None
    completion_key: str | None = None
    messages_key: str | None = None
    """A list of ``{"role": …, "content": …}``, instead of prompt and completion."""
    turn_format: str = TURN_FORMAT
    """How a turn is written; of the assistant's, what begins with the content counts."""
    append_eod: bool = True
    on_error: Literal["fail", "skip"] = "fail"
    overwrite: bool = False

    def check(self) -> None:
        """Raises a UserError that names the first value that cannot be."""
        pair = (self.prompt_key, self.completion_key)
        if (self.messages_key is None) == (None in pair) or (self.messages_key and any(pair)):
            raise UserError("give --prompt-key and --completion-key together, or --messages-key")
        for placeholder in ("{role}", "{content}"):
            if placeholder not in self.turn_format:
                raise UserError(f"--turn-format {self.turn_format!r} must contain {placeholder}")
        if self.turn_format.index("{role}") > self.turn_format.index("{content}"):
            raise UserError(f"--turn-format {self.turn_format!r}: the role must come first")


@dataclass
class InstructionReport:
    """What came of it."""

    documents: int = 0
    tokens: int = 0
    counted: int = 0
    """Tokens on which the loss counts."""
    skipped: int = 0
    """Lines passed over."""
    seconds: float = 0.0


def preprocess_instructions(options: InstructionOptions) -> InstructionReport:
    """Writes the dataset, its mask and its manifest; the tokens' index last but one.

    Raises:
        UserError: an option, an input or a line is wrong, or the dataset is there already.
    """
    options.check()
    started, report = time.monotonic(), InstructionReport()
    files, prefix = expand_inputs(options.inputs), options.output_prefix
    if not options.overwrite and idx_path(prefix).exists():
        raise UserError(f"{prefix} is there already: choose another prefix or give --overwrite")
    tokenizer = load_tokenizer(options.tokenizer)
    records: list[InputRecord] = []
    for stale in (manifest_path(prefix), idx_path(prefix), bin_path(prefix)):
        stale.unlink(missing_ok=True)
    with (
        IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as tokens,
        IndexedWriter(mask_prefix(prefix), MASK_DTYPE) as mask,
    ):
        for file in files:
            records.append(_add_file(file, options, tokenizer, (tokens, mask), report))
        if not tokens.documents:
            raise UserError(f"no usable line in {', '.join(options.inputs)}")
        report.documents, report.tokens = tokens.documents, tokens.tokens
        mask.finish()
        entry = DatasetRecord.finish(tokens, prefix, "train")
    _write_manifest(options, tokenizer, records, entry, report)
    report.seconds = time.monotonic() - started
    return report


def _add_file(
    file: Path,
    options: InstructionOptions,
    tokenizer: Tokenizer,
    writers: tuple[IndexedWriter, IndexedWriter],
    report: InstructionReport,
) -> InputRecord:
    number = 0
    with open_input(file) as raw:
        reader = HashingReader(raw)
        for block in read_blocks(file, reader, _BLOCK_BYTES):
            for line in split_lines(block):
                number += 1
                if bytes(line).strip():
                    _add_line(line, f"{file}:{number}", options, tokenizer, writers, report)
        status = file.stat()
        return InputRecord(
            path=str(file.absolute()),
            size=status.st_size,
            stamp=str(status.st_mtime_ns),
            start=0,
            end=-1,
            lines=number,
            sha256=reader.hexdigest(),
        )


def _add_line(
    line: bytes | memoryview,
    place: str,
    options: InstructionOptions,
    tokenizer: Tokenizer,
    writers: tuple[IndexedWriter, IndexedWriter],
    report: InstructionReport,
) -> None:
    document = parse_object(line)
    pieces: list[Piece] | str
    pieces = document.value if isinstance(document, Defect) else pieces_of(document, options)
    if isinstance(pieces, str):
        if options.on_error == "fail":
            raise UserError(f"{place}: {pieces}; mend it, or pass over such with --on-error skip")
        report.skipped += 1
        return
    ids, counts = encode_pieces(pieces, tokenizer, options.append_eod)
    report.counted += sum(counts)
    writers[0].add_document(np.array(ids))
    writers[1].add_document(np.array(counts))


def pieces_of(document: dict[str, Any], options: InstructionOptions) -> list[Piece] | str:
    """The text of a document in stretches, or what is wrong with it."""
    if options.messages_key is not None:
        return _turns(document.get(options.messages_key), options)
    texts = [document.get(str(key)) for key in (options.prompt_key, options.completion_key)]
    if not all(isinstance(text, str) for text in texts):
        return f"no text under {options.prompt_key} or {options.completion_key}"
    if not texts[1]:
        return f"{options.completion_key} is empty"
    return [(str(texts[0]), False), (str(texts[1]), True)]


def _turns(messages: Any, options: InstructionOptions) -> list[Piece] | str:
    if not isinstance(messages, list) or not messages:
        return f"no list of messages under {options.messages_key}"
    header, _, rest = options.turn_format.partition("{content}")
    pieces: list[Piece] = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            return "a message without the texts role and content"
        # A space before the content goes with it, as tokenizers have it.
        before = header.replace("{role}", role)
        space = before[len(before.rstrip(" ")) :]
        pieces.append((before.rstrip(" "), False))
        pieces.append((space + content + rest, role == ASSISTANT))
    if not any(counted for _, counted in pieces):
        return f"no message of the role {ASSISTANT}"
    return pieces


def encode_pieces(
    pieces: list[Piece], tokenizer: Tokenizer, append_eod: bool
) -> tuple[list[int], list[int]]:
    """Token ids, and for each whether the loss counts there (1 or 0)."""
    ids: list[int] = []
    counts: list[int] = []
    for text, counted in _joined(pieces):
        found = tokenizer.encode(text)
        ids += found
        counts += [int(counted)] * len(found)
    if append_eod:
        ids.append(tokenizer.eod)
        counts.append(int(pieces[-1][1]))
    return ids, counts


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Neighbours that are treated alike, together."""
    text, counted = pieces[0]
    for more, flag in pieces[1:]:
        if flag == counted:
            text += more
        else:
            yield text, counted
            text, counted = more, flag
    yield text, counted


def _write_manifest(
    options: InstructionOptions,
    tokenizer: Tokenizer,
    records: list[InputRecord],
    entry: DatasetRecord,
    report: InstructionReport,
) -> None:
    names = ("prompt_key", "completion_key", "messages_key", "turn_format", "append_eod")
    write_manifest(
        options.output_prefix,
        Manifest(
            inputs=records,
            tokenizer={
                "identity": tokenizer.identity,
                "eod": tokenizer.eod,
                "vocab_size": tokenizer.vocab_size,
            },
            options={name: getattr(options, name) for name in names},
            counts={
                "documents": report.documents,
                "tokens": report.tokens,
                "counted_tokens": report.counted,
                "skipped": report.skipped,
            },
            datasets=[entry],
        ),
    )
