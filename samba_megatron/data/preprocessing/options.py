"""What a user asks of preprocessing, what came of it, and what the output depends on."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from samba_megatron.data.preprocessing.encoding import Engine
from samba_megatron.platform.errors import UserError


@dataclass(frozen=True)
class SlurmOptions:
    """How the tasks are sent to a cluster: the words are sbatch's."""

    partition: str | None = None
    time: str = "24:00:00"
    mem_per_cpu_gb: int = 2
    tasks_per_job: int = 1
    """Shards that one job of the array does, one after another."""
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """Any further options, such as ``account`` or ``qos``."""
    poll_seconds: float = 5.0
    """How often the tasks' progress is looked at."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read, how, and where the datasets go."""

    inputs: list[str]
    """Files, folders, globs or fsspec URLs of JSON lines, parquet or plain text."""
    tokenizer: str
    """Folder or file of the tokenizer, or a name in the Hugging Face cache."""
    output_prefix: str
    """The dataset's ``.bin``, ``.idx`` and ``.manifest.json`` get this path."""
    workers: int = 1
    """Processes that tokenize; on Slurm: array jobs that run at a time."""
    text_key: str = "text"
    """The key (of JSON objects) or column (of parquet) that holds the text."""
    append_eod: bool = True
    """End each document with the tokenizer's EOS."""
    validation_fraction: float = 0.0
    """Part of the documents, chosen by a hash of their text, that goes to ``P_validation``."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a place without a usable document does."""
    max_errors: int = 0
    """With ``fail``: so many are passed over and reported before it fails."""
    engine: Literal["auto", "huggingface"] = "auto"
    """``auto`` uses gigatoken where it gives Hugging Face's tokens."""
    verify: bool = False
    """Compare every document's tokens with Hugging Face's."""
    shard_bytes: int | None = None
    """Text a shard holds, about; by default large enough that 2,000 shards suffice."""
    merge: bool = False
    """Join the shards to one dataset at the end."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Filters and deduplication, in order: see :mod:`.stages`."""
    overwrite: bool = False
    """Replace datasets that were made from something else."""
    slurm: SlurmOptions | None = None
    """Run the shards as an array of Slurm jobs."""

    def check(self) -> None:
        """Raises a UserError that names the first value that cannot be."""
        if self.workers < 1:
            raise UserError(f"--workers {self.workers}: at least 1 is needed")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation-fraction {self.validation_fraction}: give a part below 1, as 0.01"
            )
        if self.max_errors < 0:
            raise UserError(f"--max-errors {self.max_errors}: give 0 or more")
        if self.shard_bytes is not None and self.shard_bytes < 10**6:
            raise UserError("--shard-size must be at least 1 MB: thousands of files help no one")
        if self.verify and self.engine == "huggingface":
            raise UserError("--verify compares gigatoken with Hugging Face: leave out --engine")

    def deciding_shards(self) -> dict[str, Any]:
        """The options that the bytes of a shard depend on, once it is complete."""
        verdicts = ("on_error", "max_errors")  # decide whether it gets complete, not what it holds
        return {name: value for name, value in self.deciding().items() if name not in verdicts}

    def deciding(self) -> dict[str, Any]:
        """The options that the output depends on."""
        names = ("text_key", "append_eod", "on_error", "max_errors", "validation_fraction")
        return {name: getattr(self, name) for name in (*names, "shard_bytes", "merge", "stages")}


_COUNTED = ("documents", "tokens", "text_bytes", "read_bytes", "lines", "blank_lines")


@dataclass
class Counts:
    """What was read and written: of a shard, or of all."""

    documents: int = 0
    """Written, over all splits."""
    tokens: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the documents."""
    read_bytes: int = 0
    """Bytes read, decompressed: JSON lines with all their keys, or text."""
    lines: int = 0
    """Lines, rows or text files."""
    blank_lines: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Places without a usable document, by reason."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers by name."""
        return {name: getattr(self, name) for name in _COUNTED} | {"skipped": dict(self.skipped)}

    def add(self, other: "Counts") -> None:
        """Adds another's counts to these."""
        for name in _COUNTED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped.update(other.skipped)


@dataclass
class PreprocessReport(Counts):
    """What came of it."""

    prefix: str = ""
    up_to_date: bool = False
    """The datasets were there already: nothing was done, the counts are zero."""
    engine: Engine = Engine.HUGGINGFACE
    warnings: list[str] = field(default_factory=list)
    skipped_examples: list[str] = field(default_factory=list)
    """The first few of them, as file:line: reason."""
    shards: int = 0
    shards_kept: int = 0
    """Of these, finished by an earlier, interrupted run."""
    seconds: float = 0.0
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    """Documents and tokens of each split."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """What each stage was given and let through."""
    blend_files: list[str] = field(default_factory=list)
