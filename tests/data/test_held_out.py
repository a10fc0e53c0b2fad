"""Held-out blocks are the text itself, in order, the same every time."""

import numpy as np
import pytest
import torch

from samba_megatron.data.held_out import held_out_blocks
from samba_megatron.data.indexed import IndexedWriter, bin_path, read_index
from samba_megatron.platform.errors import UserError


def whole_text(prefix: str) -> np.ndarray:
    return np.fromfile(bin_path(prefix), dtype=read_index(prefix).dtype).astype(np.int64)


@pytest.mark.parametrize("length", [16, 255, 1024])
def test_blocks_are_the_documents_in_order(held_out, length):
    blocks = held_out_blocks([held_out], length)
    text = whole_text(held_out)
    assert len(blocks) == len(text) // (length + 1)
    for index in (0, 1, len(blocks) - 1):
        part = torch.from_numpy(text[index * (length + 1) : (index + 1) * (length + 1)])
        sample = blocks[index]
        assert torch.equal(sample["tokens"], part[:-1])
        assert torch.equal(sample["labels"], part[1:])
        assert torch.equal(sample["position_ids"], torch.arange(length))
        assert torch.equal(sample["loss_mask"], torch.ones(length))


def test_several_datasets_follow_one_another_without_mixing(tmp_path):
    for name, first, count in (("a", 0, 11), ("b", 100, 4), ("c", 200, 10)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(np.arange(first, first + count))
            writer.finish()
    blocks = held_out_blocks([str(tmp_path / name) for name in "abc"], 4)
    assert [blocks[index]["tokens"][0].item() for index in range(len(blocks))] == [0, 5, 200, 205]


def test_there_are_at_most_max_blocks_and_an_end(held_out):
    blocks = held_out_blocks([held_out], 64, max_blocks=3)
    assert len(blocks) == 3
    assert torch.equal(blocks[2]["tokens"], held_out_blocks([held_out], 64)[2]["tokens"])
    with pytest.raises(IndexError):
        blocks[3]


def test_too_little_text_for_a_block_is_refused(held_out):
    tokens = read_index(held_out).tokens
    with pytest.raises(UserError, match=f"has no block of {tokens + 1} tokens"):
        held_out_blocks([held_out], tokens)


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read .*/nowhere.idx"):
        held_out_blocks([str(tmp_path / "nowhere")], 16)
