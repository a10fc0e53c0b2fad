"""The bridge to datatrove: pipeline steps that read our shards and write Megatron's datasets.

Without filters one step reads and tokenizes, and no object is built for a document. With filters
:class:`ReadDocuments` feeds datatrove's own steps and :class:`TokenizeDocuments` ends the pipeline.
Importing this imports datatrove.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import URLFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from samba_megatron.data.preprocessing.account import ShardReading
from samba_megatron.data.preprocessing.readers import BATCH_BYTES
from samba_megatron.data.preprocessing.shard_writer import Job, ShardWriter, cannot_write
from samba_megatron.platform.errors import UserError


class TokenizeShard(PipelineStep):
    """Reads, tokenizes and writes a task's shard."""

    name = "Megatron datasets"
    type = "TOKENIZER"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Writes shard ``rank``; yields nothing."""
        with _reported(self._job, rank):
            reading = ShardReading(self._job.options, self._job.shards[rank])
            with ShardWriter(self._job, rank, reading) as writer:
                for batch, place in reading:
                    writer.add(batch.texts, place)
                writer.finish()
        return ()


class ReadDocuments(PipelineStep):
    """Reads a task's shard as datatrove's documents: the text, and all that lies beside it.

    A document's id is its place (file and line), unless the data have an ``id``.
    """

    name = "documents"
    type = "READER"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self._job = job
        self.reading: ShardReading | None = None
        """The account of the shard that is being read."""

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of shard ``rank``."""
        with _reported(self._job, rank):
            self.reading = ShardReading(self._job.options, self._job.shards[rank], True)
            for batch, place in self.reading:
                metadata = batch.metadata or [{} for _ in batch.texts]
                for index, text in enumerate(batch.texts):
                    beside = metadata[index]
                    where = place(index)
                    beside["file_path"] = where
                    yield Document(text.decode(), str(beside.pop("id", where)), metadata=beside)


class LengthFilter(BaseFilter):
    """Drops documents that are too short or too long."""

    name = "length"

    def __init__(self, min_characters: int = 0, max_characters: int | None = None) -> None:
        super().__init__()
        self._least, self._most = min_characters, max_characters

    def filter(self, doc: Document) -> tuple[bool, str]:
        """Whether a document stays, and why not."""
        if len(doc.text) < self._least:
            return False, "short"
        return self._most is None or len(doc.text) <= self._most, "long"


class AddressFilter(URLFilter):
    """datatrove's URLFilter, which says what it needs, and asks the network for nothing."""

    def __init__(self, **options: Any) -> None:
        from tldextract import TLDExtract

        super().__init__(**options)
        self.tldextractor = TLDExtract(suffix_list_urls=())

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """Whether a document stays; UserError if it has no address to judge by."""
        if not document.metadata.get("url"):
            raise UserError(
                f"{document.metadata.get('file_path', document.id)} has no 'url' beside its text: "
                "leave out the stage url, or give each document its address"
            )
        return super().filter(document)


class TokenizeDocuments(PipelineStep):
    """Tokenizes the documents that the steps before let through, and writes their datasets."""

    name = "Megatron datasets"
    type = "TOKENIZER"

    def __init__(self, job: Job, reader: ReadDocuments) -> None:
        super().__init__()
        self._job = job
        self._reader = reader

    def run(
        self, data: Iterable[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Writes shard ``rank`` from its documents; yields nothing."""
        with _reported(self._job, rank):
            reading = self._reader.reading or ShardReading(
                self._job.options, self._job.shards[rank]
            )
            # The reader's account exists only once its first document was asked for.
            batches = _batches(data)
            first = next(batches, None)
            reading = self._reader.reading or reading
            with ShardWriter(self._job, rank, reading) as writer:
                while first is not None:
                    texts, place = first
                    writer.add(texts, place)
                    first = next(batches, None)
                writer.finish()
        yield from ()


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[bytes], Callable[[int], str]]]:
    texts: list[bytes] = []
    places: list[str] = []
    size = 0
    for document in documents:
        text = document.text.encode(errors="surrogatepass")
        if not text:
            continue
        texts.append(text)
        places.append(str(document.metadata.get("file_path", document.id)))
        size += len(text)
        if size >= BATCH_BYTES:
            yield texts, places.__getitem__
            texts, places, size = [], [], 0
    if texts:
        yield texts, places.__getitem__


class _reported:
    """Leaves what went wrong in a task where the command finds it, whatever machine it was on."""

    def __init__(self, job: Job, rank: int) -> None:
        self._prefix = job.options.output_prefix
        self._errors = job.workspace.folder / "errors"
        self._rank = rank

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        error = cannot_write(self._prefix, error) or error
        text = str(error) if isinstance(error, UserError) else traceback.format_exc()
        prefix = "mistake" if isinstance(error, UserError) else "failure"
        try:
            self._errors.mkdir(parents=True, exist_ok=True)
            (self._errors / f"{prefix}_{self._rank:05d}").write_text(text, encoding="utf-8")
        except OSError:
            return  # the task fails all the same, with its own error
