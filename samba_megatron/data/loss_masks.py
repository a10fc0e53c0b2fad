"""Which tokens the loss counts: a dataset of zeros and ones beside the tokens.

The mask of the dataset ``P`` is the indexed dataset ``P_loss_mask`` (uint8): the same documents,
one number a token, 1 where that token is to be learned. So Megatron's own formats and tools serve,
and the tokens' files are what they are without masks.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from samba_megatron.data.indexed import bin_path, check_dataset, idx_path, read_index
from samba_megatron.platform.errors import UserError

SUFFIX = "_loss_mask"
MASK_DTYPE = np.dtype(np.uint8)


def mask_prefix(prefix: str | Path) -> str:
    """Where the mask of a dataset is."""
    return f"{prefix}{SUFFIX}"


def has_mask(prefix: str | Path) -> bool:
    """Whether a dataset has one."""
    return idx_path(mask_prefix(prefix)).exists()


def map_mask(prefix: str | Path) -> npt.NDArray[np.uint8] | None:
    """The mask of all tokens of a dataset, mapped; None: it has none, every token counts.

    Raises:
        UserError: the mask is damaged, or of other documents.
    """
    if not has_mask(prefix):
        return None
    tokens, mask = read_index(prefix), check_dataset(mask_prefix(prefix))
    same = (tokens.tokens, tokens.sequences) == (mask.tokens, mask.sequences)
    if mask.dtype != MASK_DTYPE or not same:
        raise UserError(
            f"{mask_prefix(prefix)} is not the loss mask of {prefix}: preprocess both again, or "
            "remove it"
        )
    return np.memmap(bin_path(mask_prefix(prefix)), mode="r", dtype=MASK_DTYPE)
