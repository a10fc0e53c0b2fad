"""Where a mask lies beside a dataset, the loss counts where it says, however samples are joined."""

import numpy as np
import pytest
import torch

from samba_megatron.config.data import DataConfig
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.data.held_out import held_out_blocks
from samba_megatron.data.identity import dataset_identity, identity_differences
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.loss_masks import map_mask, mask_prefix
from samba_megatron.platform.errors import UserError

LENGTH = 16


def write(prefix, lengths, masked=True, odd=1) -> str:
    """Documents of numbers from 1 up; of the masked ones the odd numbers count."""
    first = 1
    with (
        IndexedWriter(prefix, np.uint16) as tokens,
        IndexedWriter(mask_prefix(prefix), np.uint8) as mask,
    ):
        for length in lengths:
            numbers = np.arange(first, first + length)
            tokens.add_document(numbers)
            mask.add_document(numbers % 2 == odd)
            first += length
        tokens.finish()
        if masked:
            mask.finish()
    return str(prefix)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_labels_count_where_the_mask_says(tmp_path, packing):
    lengths = [3, 20, 5, 40, 9, 2, 2, 33, 7, 12] * 3
    prefix = write(tmp_path / "a", lengths)
    data = DataConfig([prefix], sequence_length=LENGTH, split="1", packing=packing, loss_masks=True)
    plain = DataConfig([prefix], sequence_length=LENGTH, split="1", packing=packing)
    masked, _ = build_train_and_valid(data, 60, 0, 1)
    whole, _ = build_train_and_valid(plain, 60, 0, 1)
    for number in range(60):
        sample, other = masked[number], whole[number]
        assert torch.equal(sample["tokens"], other["tokens"])
        counts = other["loss_mask"] * (sample["labels"] % 2)
        assert torch.equal(sample["loss_mask"], counts)
    assert any(float(masked[number]["loss_mask"].sum()) for number in range(60))


def test_a_dataset_without_a_mask_counts_whole(tmp_path):
    a, b = write(tmp_path / "a", [50] * 4), write(tmp_path / "b", [51] * 4, masked=False)
    data = DataConfig([a, b], sequence_length=LENGTH, split="1", loss_masks=True)
    samples, _ = build_train_and_valid(data, 16, 0, 1)
    for number in range(16):
        sample = samples[number]
        mean = float(sample["loss_mask"].mean())
        assert mean == (1.0 if int(sample["source"]) else 0.5)


def test_masks_that_no_dataset_has_are_missed(tmp_path):
    prefix = write(tmp_path / "a", [50] * 4, masked=False)
    data = DataConfig([prefix], sequence_length=LENGTH, split="1", loss_masks=True)
    with pytest.raises(UserError, match="data.loss_masks is set, and no dataset in .* has one"):
        build_train_and_valid(data, 4, 0, 1)


def test_held_out_blocks_have_the_mask_too(tmp_path):
    prefix = write(tmp_path / "a", [30, 41, 29])
    blocks = held_out_blocks([prefix], LENGTH, loss_masks=True)
    for number in range(len(blocks)):
        assert torch.equal(blocks[number]["loss_mask"], (blocks[number]["labels"] % 2).float())
    assert held_out_blocks([prefix], LENGTH)[0]["loss_mask"].all()


def test_a_mask_of_other_documents_is_refused(tmp_path):
    prefix = write(tmp_path / "a", [30, 41])
    write(tmp_path / "b", [30, 40])
    for ending in ("bin", "idx"):
        (tmp_path / f"b_loss_mask.{ending}").replace(tmp_path / f"a_loss_mask.{ending}")
    with pytest.raises(UserError, match=r"a_loss_mask is not the loss mask of .*a: preprocess"):
        map_mask(prefix)


def test_another_mask_is_other_data(tmp_path):
    data = DataConfig([write(tmp_path / "a", [60, 70])], sequence_length=LENGTH, loss_masks=True)
    before = dataset_identity(data, 1)
    assert identity_differences(before, dataset_identity(data, 1)) == []
    write(tmp_path / "a", [60, 70], odd=0)
    (found,) = identity_differences(before, dataset_identity(data, 1))
    assert found.startswith("fingerprint of the dataset")
    data.loss_masks = False
    assert "+" not in dataset_identity(data, 1)["train"][0]["fingerprint"]
