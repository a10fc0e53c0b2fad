"""Gathers a real corpus that every machine has: the Python standard library's own sources.

About 30 MB of code and English prose, enough to train a tiny model that visibly learns without
downloading anything. A document is one source file; it belongs to the held-out split or to the
training split by a hash of its path, so that the split does not move when files come and go.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

HELD_OUT_ONE_IN = 50
"""One document in this many is held out for validation."""

_EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass
class SplitCount:
    """What one split holds."""

    documents: int = 0
    text_bytes: int = 0


@dataclass
class CorpusReport:
    """What :func:`gather_corpus` wrote and what it left out."""

    source: Path
    train: SplitCount = field(default_factory=SplitCount)
    validation: SplitCount = field(default_factory=SplitCount)
    undecodable: int = 0
    """Files that are not UTF-8."""
    empty: int = 0
    """Files without text."""
    over_budget: int = 0
    """Files left out to stay within ``max_megabytes``."""


def gather_corpus(
    output: Path, max_megabytes: float | None = None, source: Path | None = None
) -> CorpusReport:
    """Writes ``train.jsonl`` and ``validation.jsonl`` (objects with ``text`` and ``path``).

    The output depends only on the files below ``source``, never on the order in which the file
    system lists them.

    Args:
        output: folder to write to; created when missing.
        max_megabytes: take no more than this many MB (10^6 bytes) of source files; which ones is
            decided by a hash of their paths, so that every part of the library is represented.
        source: folder to gather from; by default the running Python's standard library.

    Raises:
        UserError: ``source`` holds no Python files, none fits into ``max_megabytes``, or
            ``output`` cannot be written.
    """
    root = source or Path(sysconfig.get_path("stdlib"))
    paths = _source_files(root)
    if not paths:
        raise UserError(f"{root} holds no .py files: install Python with its standard library")
    chosen = _within_budget(root, paths, max_megabytes)
    report = CorpusReport(root, over_budget=len(paths) - len(chosen))
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(output / "train.jsonl") as train,
            atomic_write(output / "validation.jsonl") as validation,
        ):
            for relative, text in _documents(root, chosen, report):
                held_out = is_held_out(relative)
                count = report.validation if held_out else report.train
                count.documents += 1
                count.text_bytes += len(text.encode())
                line = json.dumps({"text": text, "path": relative}, ensure_ascii=False)
                (validation if held_out else train).write(line + "\n")
    except OSError as error:
        raise UserError(f"cannot write the corpus to {output}: {error.strerror}") from error
    return report


def is_held_out(relative_path: str) -> bool:
    """Whether the document at this path (POSIX, below the source) is held out."""
    return _path_hash(relative_path) % HELD_OUT_ONE_IN == 0


def _source_files(root: Path) -> list[str]:
    """Paths of all Python sources below ``root``, relative and POSIX, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _EXCLUDED_FOLDERS]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(path.relative_to(root).as_posix() for path in found)


def _within_budget(root: Path, paths: list[str], max_megabytes: float | None) -> list[str]:
    """The files to take so that their sizes sum to at most ``max_megabytes``, in path order."""
    if max_megabytes is None:
        return paths
    budget = max_megabytes * 1e6
    chosen = []
    for path in sorted(paths, key=_path_hash):
        budget -= (root / path).stat().st_size
        if budget < 0:
            break
        chosen.append(path)
    if not chosen:
        raise UserError(f"--max-megabytes {max_megabytes} has no room for a single file: raise it")
    return sorted(chosen)


def _documents(root: Path, paths: list[str], report: CorpusReport) -> Iterator[tuple[str, str]]:
    """Yields each readable file's path and text; counts the others in ``report``."""
    for path in paths:
        try:
            text = (root / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            report.undecodable += 1
            continue
        if text.strip():
            yield path, text
        else:
            report.empty += 1


def _path_hash(path: str) -> int:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
