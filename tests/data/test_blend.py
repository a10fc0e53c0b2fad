"""Blends are read as Megatron reads them, and a changed dataset is noticed on resuming."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import (
    Blend,
    dataset_identity,
    identity_differences,
    parse_blend,
    split_fractions,
)
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.platform.errors import UserError


def test_prefixes_alone_or_with_weights():
    assert parse_blend(["a", "b"]) == Blend(["a", "b"], None)
    assert parse_blend(["0.3", "a", "0.7", "b"]) == Blend(["a", "b"], [0.3, 0.7])
    assert parse_blend(["2", "a"]) == Blend(["a"], [2.0])


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "data.data_path is empty"),
        (["0.3", "a", "b"], "mixes weights and prefixes"),
        (["0.3", "a", "b", "c"], "mixes weights and prefixes"),
        (["0.3", "0.7"], "mixes weights and prefixes"),
        (["0", "a", "1", "b"], "must be a positive number"),
        (["nan", "a", "1", "b"], "must be a positive number"),
        (["inf", "a", "1", "b"], "must be a positive number"),
    ],
)
def test_bad_blends_are_refused(paths, message):
    with pytest.raises(UserError, match=message):
        parse_blend(paths)


def test_splits_are_fractions():
    assert split_fractions("98,2,0") == (0.98, 0.02, 0.0)
    assert split_fractions("1") == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "nan,1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(UserError, match=r"data\.split is"):
        split_fractions(split)


@pytest.fixture
def data(dataset, held_out, tokenizer_folder) -> DataConfig:
    return DataConfig(
        data_path=[dataset],
        valid_data_path=[held_out],
        tokenizer=str(tokenizer_folder),
        sequence_length=64,
    )


def test_an_identity_equals_itself_and_a_moved_copy(data, dataset, tmp_path):
    before = dataset_identity(data, 1)
    assert identity_differences(before, dataset_identity(data, 1)) == []
    for ending in ("bin", "idx"):
        shutil.copy(f"{dataset}.{ending}", tmp_path / f"moved.{ending}")
    moved = replace(data, data_path=[str(tmp_path / "moved")])
    assert identity_differences(before, dataset_identity(moved, 1)) == []


def test_what_changes_is_named(data, held_out):
    before = dataset_identity(data, 1)

    def differences(seed: int = 1, **changes) -> str:
        return "; ".join(
            identity_differences(before, dataset_identity(replace(data, **changes), seed))
        )

    assert differences(seed=2) == "random_seed was 1, now 2"
    assert differences(sequence_length=32) == "sequence_length was 64, now 32"
    assert "documents of the train dataset" in differences(data_path=[held_out])
    assert "the train blend had 1 datasets, now 2" in differences(data_path=[held_out, held_out])
    assert "weight of the train dataset" in differences(data_path=["0.5", data.data_path[0]])
    assert "tokenizer was" in differences(tokenizer=None)
    assert "the valid blend had 1 datasets, now 0" in differences(valid_data_path=[])


def test_new_content_under_an_old_name_is_noticed(tmp_path):
    def write(values: list[int]) -> None:
        with IndexedWriter(tmp_path / "d", np.uint16) as writer:
            writer.add_document(np.array(values))
            writer.finish()

    data = DataConfig(data_path=[str(Path(tmp_path, "d"))], sequence_length=2)
    write([1, 2, 3])
    before = dataset_identity(data, 1)
    write([1, 2, 4])
    assert (
        "fingerprint of the train dataset"
        in identity_differences(before, dataset_identity(data, 1))[0]
    )
