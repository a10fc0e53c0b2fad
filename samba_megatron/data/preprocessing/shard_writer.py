"""Tokenizes a shard's texts and writes its datasets, one for each split, whole or not at all."""

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from samba_megatron.data.indexed import (
    IndexedWriter,
    bin_path,
    idx_path,
    shard_prefix,
    token_dtype,
)
from samba_megatron.data.jsonl import Defect
from samba_megatron.data.manifest import (
    DatasetRecord,
    InputRecord,
    Manifest,
    manifest_path,
    write_manifest,
)
from samba_megatron.data.preprocessing.account import ShardReading
from samba_megatron.data.preprocessing.encoding import BatchTokenizer, Engine
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.shards import Shard
from samba_megatron.data.preprocessing.workspace import Workspace
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

TRAIN, VALIDATION = "train", "validation"
_NOTE_EVERY_S = 0.3
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class Job:
    """All that a task needs to do any shard, here or on another machine."""

    options: PreprocessOptions
    engine: Engine
    shards: tuple[Shard, ...]
    threads: bool = False
    """One process uses all cores: there is only one shard."""
    described: tuple[tuple[str, Any], ...] = ()
    """The tokenizer's identity, for the manifests."""
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def workspace(self) -> Workspace:
        """Where the run keeps its state."""
        return Workspace(self.options.output_prefix)

    def dataset_prefix(self, shard: int, split: str) -> str:
        """Where a shard's dataset goes: the output itself if there is one shard."""
        base = split_prefix(self.options.output_prefix, split)
        if len(self.shards) == 1:
            return base
        if self.options.merge:
            return shard_prefix(self.workspace.folder / "datasets" / split, shard)
        return shard_prefix(base, shard)

    @property
    def splits(self) -> list[str]:
        """The splits that are written."""
        return [TRAIN, VALIDATION] if self.options.validation_fraction else [TRAIN]


def split_prefix(prefix: str, split: str) -> str:
    """The prefix of a split's dataset or shards."""
    return prefix if split == TRAIN else f"{prefix}_{split}"


_loaded: dict[tuple[Any, ...], tuple[Tokenizer, BatchTokenizer]] = {}


def _tokenizer_of(job: Job) -> tuple[Tokenizer, BatchTokenizer]:
    """The tokenizer of this process: shards done one after another share its memory of words."""
    options = job.options
    key = (options.tokenizer, job.engine, options.append_eod, options.verify, job.threads)
    if key not in _loaded:
        _loaded.clear()
        tokenizer = load_tokenizer(options.tokenizer)
        _loaded[key] = tokenizer, BatchTokenizer(tokenizer, *key[1:])
    return _loaded[key]


class ShardWriter:
    """Takes a shard's texts in order; :meth:`finish` publishes its datasets and its record."""

    def __init__(self, job: Job, number: int, reading: ShardReading) -> None:
        self._job = job
        self._number = number
        self._reading = reading
        self._workspace = job.workspace
        self._tokenizer, self._tokenize = _tokenizer_of(job)
        self._threshold = int(job.options.validation_fraction * (1 << 64))
        self._noted = 0.0
        self._writers: dict[str, IndexedWriter] = {}
        dtype = token_dtype(self._tokenizer.vocab_size)
        for split in job.splits:
            self._writers[split] = IndexedWriter(job.dataset_prefix(number, split), dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for writer in self._writers.values():
            writer.discard()

    def add(self, texts: list[bytes], place: Callable[[int], str]) -> None:
        """Tokenizes and writes texts; ``place`` names the place of one of them.

        Raises:
            UserError: the engines differ on a text, or the tokenizer leaves nothing of one and
                that is not allowed.
            OSError: there is no space left; see :func:`cannot_write`.
        """
        if self._threshold:
            held_out = [_document_hash(text) < self._threshold for text in texts]
            for split, chosen in ((TRAIN, False), (VALIDATION, True)):
                indices = [i for i, held in enumerate(held_out) if held is chosen]
                self._add_to(split, [texts[i] for i in indices], lambda i, n=indices: place(n[i]))  # type: ignore[misc]
        else:
            self._add_to(TRAIN, texts, place)
        if time.monotonic() - self._noted > _NOTE_EVERY_S:
            self._note_progress()

    def _add_to(self, split: str, texts: list[bytes], place: Callable[[int], str]) -> None:
        if not texts:
            return
        found = self._tokenize(texts)
        if found.disagreement is not None:
            raise UserError(
                f"gigatoken gives other tokens than Hugging Face for {place(found.disagreement)}: "
                "run again with --engine huggingface"
            )
        for index in found.emptied:
            self._reading.skip(Defect.EMPTY, lambda i=index: place(i))  # type: ignore[misc]
        self._writers[split].add(found.tokens, found.lengths)
        left_out = sum(len(texts[index]) for index in found.emptied)
        self._reading.counts.text_bytes += sum(map(len, texts)) - left_out

    def _note_progress(self) -> None:
        self._noted = time.monotonic()
        self._workspace.note_progress(
            self._number,
            self._reading.raw_bytes,
            self._reading.counts.read_bytes,
            sum(writer.documents for writer in self._writers.values()),
            sum(writer.tokens for writer in self._writers.values()),
        )

    def finish(self) -> None:
        """Publishes what was written, then its record: a shard without one is done again."""
        counts = self._reading.counts
        counts.documents = sum(writer.documents for writer in self._writers.values())
        counts.tokens = sum(writer.tokens for writer in self._writers.values())
        datasets = {split: self._publish(split) for split in self._writers}
        record = self._reading.record()
        record["datasets"] = [asdict(entry) for entry in datasets.values() if entry]
        self._note_progress()
        self._workspace.write_record(self._number, record)

    def _publish(self, split: str) -> DatasetRecord | None:
        """Publishes a split's dataset, with a manifest of its own if it is one of several."""
        writer, prefix = self._writers[split], self._job.dataset_prefix(self._number, split)
        manifest_path(prefix).unlink(missing_ok=True)
        if writer.documents == 0:
            for path in (idx_path(prefix), bin_path(prefix)):
                path.unlink(missing_ok=True)
            writer.discard()
            return None
        entry = DatasetRecord.finish(writer, prefix, split)
        if len(self._job.shards) > 1 and not self._job.options.merge:
            write_manifest(prefix, self._manifest(entry))
        return entry

    def _manifest(self, entry: DatasetRecord) -> Manifest:
        """A shard's own: what was read for it, and what is in this split of it."""
        record = self._reading.record()
        counts = record["counts"] | {"documents": entry.documents, "tokens": entry.tokens}
        if len(self._writers) > 1:
            del counts["text_bytes"]  # is known of both splits together
        return Manifest(
            inputs=[InputRecord(**source) for source in record["inputs"]],
            tokenizer=dict(self._job.described),
            options=self._job.options.deciding(),
            counts=counts | {"skipped_examples": record["examples"]},
            datasets=[entry],
            made_by={"shard": self._number, "of": len(self._job.shards)},
        )


def _document_hash(text: bytes) -> int:
    """A number below 2^64, the same for a text wherever it stands."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def cannot_write(prefix: str, error: BaseException | None) -> UserError | None:
    """The sentence for a full disk, a quota or a missing permission; None for other errors."""
    if not isinstance(error, OSError) or error.errno not in _NO_ROOM:
        return None
    return UserError(
        f"cannot write {prefix}: {error.strerror}; what is finished is kept: mend that and run "
        "the same command again"
    )
