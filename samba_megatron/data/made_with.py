"""The tokenizer that a run names, held against the one that its datasets were made with.

Ids of another vocabulary are numbers like any others: a model trains on them, and is asked about
other words later.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import training_blend, validation_blend
from samba_megatron.data.indexed import corpus_of
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_MOST_READ = 16
"""Of a corpus: its shards are made alike, and some tell for all on a file system that is slow."""


def other_tokenizers(data: DataConfig) -> list[str]:
    """What a person should look at before training: one sentence a tokenizer, mostly none.

    It is no error: a tokenizer that was saved again, or got further special tokens, is another file
    with the same ids.

    Raises:
        UserError: the tokenizer or a blend file cannot be read.
    """
    if not data.tokenizer:
        return []
    tokenizer = load_tokenizer(data.tokenizer)
    prefixes = training_blend(data).prefixes
    if data.valid_data_path:
        prefixes = [*prefixes, *validation_blend(data.valid_data_path).prefixes]
    found: dict[str, str] = {}
    for prefix in _some_of_each_corpus(prefixes):
        made_with = _made_with(prefix)
        identity = made_with.get("identity", tokenizer.identity)
        if identity != tokenizer.identity:
            found.setdefault(identity, _difference(prefix, made_with, tokenizer))
    return list(found.values())


def _some_of_each_corpus(prefixes: Iterable[str]) -> Iterator[str]:
    corpora: dict[str, list[str]] = {}
    for prefix in prefixes:
        corpora.setdefault(corpus_of(prefix), []).append(prefix)
    for shards in corpora.values():
        yield from shards[:: max(1, -(-len(shards) // _MOST_READ))]


def _made_with(prefix: str) -> dict[str, Any]:
    with contextlib.suppress(UserError):  # another version's, which training does not need
        manifest = read_manifest(prefix)
        if manifest and isinstance(manifest.tokenizer, dict):
            return manifest.tokenizer
    return {}


def _difference(prefix: str, made_with: dict[str, Any], tokenizer: Tokenizer) -> str:
    return (
        f"{prefix} was made with another tokenizer than data.tokenizer {tokenizer.path} "
        f"(vocabulary {made_with.get('vocab_size')}, here {tokenizer.vocab_size}; end of document "
        f"{made_with.get('eod')}, here {tokenizer.eod}): make sure that its ids are the same"
    )
