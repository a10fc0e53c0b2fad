"""The tokenizer that a run names, held against the one that its datasets were made with.

Ids of another vocabulary are numbers like any others: a model trains on them, and is asked about
other words later.
"""

import contextlib
from typing import Any

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import training_blend, validation_blend
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_MOST_READ = 16
"""The shards of a corpus are made alike: some tell for all, on a file system that may be slow."""


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
    blends = [training_blend(data)]
    if data.valid_data_path:
        blends.append(validation_blend(data.valid_data_path))
    found: dict[str, str] = {}
    for blend in blends:
        prefixes = blend.prefixes
        for prefix in prefixes[:: max(1, -(-len(prefixes) // _MOST_READ))]:
            made_with = _made_with(prefix)
            identity = made_with.get("identity", tokenizer.identity)
            if identity != tokenizer.identity:
                found.setdefault(identity, _difference(prefix, made_with, tokenizer))
    return list(found.values())


def _made_with(prefix: str) -> dict[str, Any]:
    with contextlib.suppress(UserError):  # another version's, which training does not need
        manifest = read_manifest(prefix)
        return manifest.tokenizer if manifest else {}
    return {}


def _difference(prefix: str, made_with: dict[str, Any], tokenizer: Tokenizer) -> str:
    return (
        f"{prefix} was made with another tokenizer than data.tokenizer {tokenizer.path} "
        f"(vocabulary {made_with.get('vocab_size')}, here {tokenizer.vocab_size}; end of document "
        f"{made_with.get('eod')}, here {tokenizer.eod}): make sure that its ids are the same"
    )
