"""Fixed blocks of held-out text: the same tokens at every validation of a context length."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from samba_megatron.data.indexed import bin_path, check_dataset, map_index
from samba_megatron.data.loss_masks import map_mask
from samba_megatron.platform.errors import UserError


class HeldOutBlocks:
    """Consecutive, non-overlapping blocks of ``sequence_length + 1`` tokens in document order.

    The tail of each dataset that does not fill a block is left out.
    """

    def __init__(
        self,
        prefixes: Sequence[str],
        sequence_length: int,
        max_blocks: int | None = None,
        reset_at_document_boundaries: bool = False,
        loss_masks: bool = False,
    ) -> None:
        infos = [check_dataset(prefix) for prefix in prefixes]
        self._block = sequence_length + 1
        self._tokens = [
            np.memmap(bin_path(info.prefix), mode="r", dtype=info.dtype) for info in infos
        ]
        self._masks = [map_mask(info.prefix) if loss_masks else None for info in infos]
        self._with_starts = reset_at_document_boundaries
        self._pointers = [map_index(info.prefix)[1] for info in infos]
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
        """Block ``index`` as a sample: ``tokens``, ``labels``, ``position_ids``, ``loss_mask``, and
        ``document_start`` where documents stay apart."""
        if not 0 <= index < self._length:
            raise IndexError(f"block {index} of {self._length}")
        dataset = bisect_right(self._ends, index)
        first = (index - (self._ends[dataset - 1] if dataset else 0)) * self._block
        block = self._tokens[dataset][first : first + self._block]
        text = torch.from_numpy(block.astype(np.int64))
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": self._loss_mask(dataset, first),
            "position_ids": torch.arange(self._block - 1),
        }
        if self._with_starts:
            sample["document_start"] = self._document_start(dataset, first)
        return sample

    def _loss_mask(self, dataset: int, first: int) -> torch.Tensor:
        """Float32 ``[s]``: 1 where the loss counts."""
        mask = self._masks[dataset]
        if mask is None:
            return torch.ones(self._block - 1)
        return torch.from_numpy(mask[first + 1 : first + self._block].astype(np.float32))

    def _document_start(self, dataset: int, first: int) -> torch.Tensor:
        """Bool ``[s]``: where a document begins, and at the first token."""
        size = self._tokens[dataset].itemsize
        pointers = self._pointers[dataset]
        ends = np.array([first, first + self._block - 1]) * size
        low, high = np.searchsorted(pointers, ends)
        start = torch.zeros(self._block - 1, dtype=torch.bool)
        start[0] = True
        start[torch.from_numpy(pointers[low:high] // size - first)] = True
        return start


def held_out_blocks(
    prefixes: Sequence[str],
    sequence_length: int,
    max_blocks: int | None = None,
    reset_at_document_boundaries: bool = False,
    loss_masks: bool = False,
) -> HeldOutBlocks:
    """Blocks for validating at a context of ``sequence_length``, at most ``max_blocks`` of them.

    Args:
        prefixes: datasets.
        sequence_length: tokens of a block.
        max_blocks: the most of them.
        reset_at_document_boundaries: blocks say where documents begin.
        loss_masks: the loss counts where the mask beside a dataset says so.

    Raises:
        UserError: a dataset is missing or damaged, or there is not one whole block.
    """
    return HeldOutBlocks(
        prefixes, sequence_length, max_blocks, reset_at_document_boundaries, loss_masks
    )
