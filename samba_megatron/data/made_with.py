"""The tokenizer that a run names, held against the one that its datasets were made with.

Ids of another vocabulary are numbers like any others: a model trains on them, and is asked about
other words later.
"""

import contextlib

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import training_blend, validation_blend
from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

_MOST_READ = 16
"""The shards of a corpus are made alike: some tell for all, on a file system that may be slow."""


def other_tokenizers(data: DataConfig) -> list[str]:
    """What a person should look at before training: one sentence a dataset, mostly none.

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
    found = []
    for blend in blends:
        prefixes = blend.prefixes
        for prefix in prefixes[:: max(1, -(-len(prefixes) // _MOST_READ))]:
            found += _difference(str(prefix), tokenizer)
    return found


def _difference(prefix: str, tokenizer: Tokenizer) -> list[str]:
    made_with = {}
    with contextlib.suppress(UserError):  # another version's, which training does not need
        manifest = read_manifest(prefix)
        made_with = manifest.tokenizer if manifest else {}
    if made_with.get("identity") in (None, tokenizer.identity):
        return []
    return [
        f"{prefix} was made with another tokenizer than data.tokenizer {tokenizer.path} "
        f"(vocabulary {made_with.get('vocab_size')}, here {tokenizer.vocab_size}; end of document "
        f"{made_with.get('eod')}, here {tokenizer.eod}): make sure that its ids are the same"
    ]
