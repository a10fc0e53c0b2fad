"""What already lies at the output: the same datasets, other ones, or someone else's files."""

import re
from pathlib import Path
from typing import Any

from samba_megatron.data.indexed import bin_path, check_dataset, idx_path
from samba_megatron.data.manifest import InputRecord, Manifest, manifest_path, read_manifest
from samba_megatron.data.preprocessing.inputs import InputFile
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.readers import PieceReader
from samba_megatron.data.preprocessing.shard_writer import TRAIN, VALIDATION, split_prefix
from samba_megatron.data.preprocessing.shards import Piece
from samba_megatron.platform.errors import UserError


def is_up_to_date(
    options: PreprocessOptions, files: list[InputFile], tokenizer: dict[str, Any]
) -> bool:
    """Whether the datasets at the prefix are what these inputs, tokenizer and options would make.

    False means: go ahead. Datasets whose description is equal but whose files are missing or
    damaged are written again.

    Raises:
        UserError: they are others and ``overwrite`` is not set; the message names what differs.
    """
    manifest = _manifest(options)
    if manifest is None:
        return False
    changed = _differences(manifest, files, tokenizer, options)
    if not changed:
        return all(_is_intact(options.output_prefix, split) for split in _splits(options))
    if options.overwrite:
        return False
    raise UserError(
        f"the dataset {options.output_prefix} was made differently ({'; '.join(changed)}): choose "
        "another --output-prefix or give --overwrite to replace it"
    )


def _manifest(options: PreprocessOptions) -> Manifest | None:
    """The manifest of all; one that cannot be read counts for nothing when it is replaced."""
    try:
        return read_manifest(options.output_prefix)
    except UserError:
        if options.overwrite:
            return None
        raise


def _splits(options: PreprocessOptions) -> list[str]:
    return [TRAIN, VALIDATION] if options.validation_fraction else [TRAIN]


def _differences(
    manifest: Manifest,
    files: list[InputFile],
    tokenizer: dict[str, Any],
    options: PreprocessOptions,
) -> list[str]:
    """What differs from the manifest, in words."""
    changed = [
        f"{name} was {manifest.options.get(name)!r}, now {value!r}"
        for name, value in options.deciding().items()
        if manifest.options.get(name) != value
    ]
    if manifest.tokenizer != tokenizer:
        changed.append("the tokenizer is another one")
    recorded: dict[str, list[InputRecord]] = {}
    for entry in manifest.inputs:
        recorded.setdefault(entry.path, []).append(entry)
    if len(recorded) != len(files):
        changed.append(f"there were {len(recorded)} inputs, now {len(files)}")
        return changed
    for pieces, file in zip(recorded.values(), files, strict=True):
        if not _is_same_file(pieces, file, options.text_key):
            changed.append(f"the input {file.path} has changed")
    return changed


def _is_same_file(pieces: list[InputRecord], file: InputFile, text_key: str) -> bool:
    """Whether a file's content is the recorded one; reads it only if its time has changed."""
    first = pieces[0]
    if file.size != first.size:
        return False
    if (file.path, file.stamp) == (first.path, first.stamp):
        return True
    return all(_hash(entry, file, text_key) == entry.sha256 for entry in pieces)


def _hash(entry: InputRecord, file: InputFile, text_key: str) -> str:
    reader = PieceReader(Piece(file, entry.start, entry.end, file.size), text_key)
    for _ in reader:
        pass
    return reader.sha256


def _is_intact(prefix: str, split: str) -> bool:
    """Whether all datasets of a split are there, as long as they were written."""
    base = Path(split_prefix(prefix, split))
    manifest = read_manifest(base)
    if manifest is None:
        return split == VALIDATION  # nothing was held out
    for entry in manifest.datasets:
        path = base.with_name(entry.name)
        try:
            check_dataset(path)
        except UserError:
            return False
        sizes = bin_path(path).stat().st_size, idx_path(path).stat().st_size
        if sizes != (entry.bin_bytes, entry.idx_bytes):
            return False
    return True


def _lying_there(prefix: str) -> list[Path]:
    """Files at the places that a run would write, of whatever origin."""
    base = Path(prefix)
    pattern = re.compile(
        rf"{re.escape(base.name)}(_{VALIDATION})?(_\d{{5,}})?\.(bin|idx|manifest\.json|blend\.yaml)"
    )
    if not base.parent.is_dir():
        return []
    return sorted(path for path in base.parent.iterdir() if pattern.fullmatch(path.name))


def refuse_foreign(options: PreprocessOptions) -> None:
    """Raises a UserError if files lie there that no manifest speaks of."""
    if options.overwrite or manifest_path(options.output_prefix).exists():
        return
    found = [p for p in _lying_there(options.output_prefix) if p.suffix in (".bin", ".idx")]
    own = {path for path in found if _has_own_manifest(path)}
    foreign = [path for path in found if path not in own]
    if foreign:
        raise UserError(
            f"{foreign[0]} exists without a manifest: choose another --output-prefix or give "
            "--overwrite to replace it"
        )
    if own:
        raise UserError(
            f"{min(own)} is of another run: choose another --output-prefix or give --overwrite "
            "to replace it"
        )


def _has_own_manifest(path: Path) -> bool:
    return manifest_path(path.with_suffix("")).exists()


def discard_existing(options: PreprocessOptions) -> None:
    """Removes datasets that are about to be replaced, manifests first, indices before data."""
    order = {".json": 0, ".yaml": 1, ".idx": 2, ".bin": 3}
    for path in sorted(_lying_there(options.output_prefix), key=lambda p: order[p.suffix]):
        path.unlink()
