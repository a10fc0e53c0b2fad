"""Fixed blocks of held-out text: the same tokens at every validation of a context length."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from samba_megatron.data.indexed import bin_path, check_dataset
from samba_megatron.platform.errors import UserError


class HeldOutBlocks:
    """Consecutive, non-overlapping blocks of ``sequence_length + 1`` tokens in document order.

    The tail of each dataset that does not fill a block is left out.
    """

    def __init__(
        self, prefixes: Sequence[str], sequence_length: int, max_blocks: int | None = None
    ) -> None:
        infos = [check_dataset(prefix) for prefix in prefixes]
        self._block = sequence_length + 1
        self._tokens = [
            np.memmap(bin_path(info.prefix), mode="r", dtype=info.dtype) for info in infos
        ]
        self._ends = list(accumulate(info.tokens // self._block for info in infos))
        available = self._ends[-1] if self._ends else 0
        if available == 0:
            raise UserError(
                f"the held-out data {', '.join(prefixes)} has no block of {self._block} tokens: "
                f"validate at less than {sequence_length} tokens or hold out more"
            )
        self._length = min(available, max_blocks or available)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Block ``index`` as a sample: ``tokens``, ``labels``, ``position_ids``, ``loss_mask``."""
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        dataset = bisect_right(self._ends, index)
        local = index - (self._ends[dataset - 1] if dataset else 0)
        block = self._tokens[dataset][local * self._block : (local + 1) * self._block]
        text = torch.from_numpy(block.astype(np.int64))
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": torch.ones(self._block - 1),
            "position_ids": torch.arange(self._block - 1),
        }


def held_out_blocks(
    prefixes: Sequence[str], sequence_length: int, max_blocks: int | None = None
) -> HeldOutBlocks:
    """Blocks for validating at a context of ``sequence_length``, at most ``max_blocks`` of them.

    Raises:
        UserError: a dataset is missing or damaged, or there is not one whole block.
    """
    return HeldOutBlocks(prefixes, sequence_length, max_blocks)
