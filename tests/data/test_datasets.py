"""Samples are Megatron's, in an order that a longer run, a restart or a second process keeps."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from samba_megatron.config.data import DataConfig
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.data.indexed import IndexedWriter, read_index
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError


@pytest.fixture
def data(dataset, tmp_path) -> DataConfig:
    return DataConfig(
        data_path=[dataset], sequence_length=128, path_to_cache=str(tmp_path / "cache")
    )


def build(
    data: DataConfig, train_samples: int = 100, valid_samples: int = 0, seed: int = 7, **more
):
    return build_train_and_valid(data, train_samples, valid_samples, seed, **more)


def tokens(dataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[index]["tokens"] for index in range(count)])


def test_one_epoch_is_megatrons(data, dataset, tokenizer_folder, tmp_path):
    config = GPTDatasetConfig(
        random_seed=7,
        sequence_length=128,
        blend=([dataset], None),
        split="90,10,0",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=load_tokenizer(tokenizer_folder),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    expected = BlendedMegatronDatasetBuilder(GPTDataset, [500, 20, 0], lambda: True, config).build()
    sizes = [len(part) for part in expected[:2]]
    found = build(replace(data, split="90,10,0"), *sizes)
    for ours, theirs in zip(found, expected[:2], strict=True):
        assert len(ours) == len(theirs) > 20
        for index in range(len(ours)):
            for name, value in theirs[index].items():
                assert torch.equal(ours[index][name], value)
                assert ours[index][name].dtype == value.dtype


def test_epochs_each_read_everything_in_another_order(data, dataset):
    per_epoch = (read_index(dataset).tokens - 1) // 128
    two, _ = build(replace(data, split="1"), 2 * per_epoch)
    first, second = (
        torch.stack([two[start + i]["tokens"] for i in range(per_epoch)]).flatten()
        for start in (0, per_epoch)
    )
    assert not torch.equal(first, second)
    # Each epoch drops less than a sample's tokens at its end.
    difference = torch.bincount(first, minlength=2048) - torch.bincount(second, minlength=2048)
    assert difference.abs().sum() < 2 * 128


def test_a_longer_run_begins_with_the_shorter_one(data, dataset, held_out):
    blend = replace(data, data_path=["0.2", dataset, "0.8", held_out])
    for source in (data, blend):
        shorter, _ = build(source, 3000)
        longer, _ = build(source, 9000)
        assert torch.equal(tokens(shorter, 3000), tokens(longer, 3000))


def test_the_seed_decides_the_order(data):
    once, again, other = (build(data, 100, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(tokens(once, 100), tokens(again, 100))
    assert not torch.equal(tokens(once, 100), tokens(other, 100))


def test_unweighted_blends_follow_the_token_counts_and_wrap_around(data, dataset, held_out):
    blend, _ = build(replace(data, data_path=[dataset, held_out]), 20_000)
    assert len(blend) == 20_000
    sizes = [read_index(prefix).tokens for prefix in (dataset, held_out)]
    count = sum(int(blend[index]["source"]) for index in range(2000))
    assert abs(count - 2000 * sizes[1] / sum(sizes)) < 1
    assert blend[19_999]["tokens"].shape == (128,)


def test_validation_comes_from_its_own_data_or_a_part(data, held_out):
    _, none = build(data, 10)
    assert none is None
    _, part = build(replace(data, split="9,1"), 10, 5)
    assert len(part) >= 5
    _, own = build(replace(data, valid_data_path=[held_out]), 10, 5)
    inside = [contains(held_out, own[index]["tokens"]) for index in range(len(own))]
    assert sum(inside) > len(own) / 2  # the others run over the border of two documents
    assert not any(contains(held_out, part[index]["tokens"]) for index in range(len(part)))


def contains(prefix: str, sample: torch.Tensor) -> bool:
    return sample.numpy().astype(np.uint16).tobytes() in Path(f"{prefix}.bin").read_bytes()


def test_a_part_that_is_not_asked_for_may_be_empty(tmp_path):
    write(tmp_path / "d", [np.arange(100)] * 3)
    data = DataConfig(data_path=[str(tmp_path / "d")], sequence_length=16)
    train, valid = build(data, 5, 0)
    assert len(train) >= 5
    assert valid is None
    with pytest.raises(UserError, match="has 0 tokens for validation"):
        build(data, 5, 1)


def write(prefix: Path, documents: list[np.ndarray]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in documents:
            writer.add_document(document)
        writer.finish()


def test_the_loss_can_leave_out_what_follows_a_document(tmp_path, tokenizer_folder):
    eod = load_tokenizer(tokenizer_folder).eod
    write(tmp_path / "d", [np.array([5, 6, 7, eod])] * 50)
    data = DataConfig(
        data_path=[str(tmp_path / "d")],
        sequence_length=12,
        tokenizer=str(tokenizer_folder),
        eod_mask_loss=True,
    )
    sample = build(data, 3)[0][1]
    assert torch.equal(sample["loss_mask"] == 0, sample["tokens"] == eod)
    assert sample["document_start"][0]
    assert torch.equal(sample["document_start"][1:], sample["tokens"][:-1] == eod)
    with pytest.raises(UserError, match="data.eod_mask_loss needs .*: set data.tokenizer"):
        build(replace(data, tokenizer=None), 3)


def test_a_dataset_made_again_is_not_served_from_the_old_cache(tmp_path):
    data = DataConfig(data_path=[str(tmp_path / "d")], sequence_length=8)
    write(tmp_path / "d", [np.arange(100)] * 3)
    assert build(data)[0][0]["tokens"].max() < 100
    write(tmp_path / "d", [np.arange(200, 210)] * 40)
    sample = build(data)[0][0]["tokens"]
    assert 200 <= sample.min() <= sample.max() < 210


def test_the_cache_is_used_and_a_broken_one_is_not(data):
    expected = tokens(build(data)[0], 100)
    cache = Path(data.path_to_cache)
    before = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 2
    build(data)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:-10])
    assert torch.equal(tokens(build(data)[0], 100), expected)
    assert {path.name: path.stat().st_size for path in cache.iterdir()}.keys() == before.keys()


def test_two_processes_make_the_same_samples_at_once_and_together(tmp_path, dataset, held_out):
    program = Path(__file__).with_name("two_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(rank), tmp_path, dataset, held_out],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=270)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    first, second = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert first == second
    assert first["alone"] == first["together"]
    assert "cannot read /nowhere.idx" in first["error"]
    for cache in ("raced", "shared"):
        assert not list((tmp_path / cache).glob(".*"))
        assert len(list((tmp_path / cache).glob("*.pack"))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": ["/nowhere"]}, "cannot read /nowhere.idx"),
        ({"data_path": []}, "data.data_path is empty"),
        ({"valid_data_path": ["/nowhere"]}, "cannot read /nowhere.idx"),
        ({"split": "1,0"}, "leaves nothing for validation"),
        ({"path_to_cache": "/proc/no"}, r"cannot write the index cache /proc/no \(No such"),
        ({"split": "0,1"}, "leaves nothing for training"),
        ({"sequence_length": 10_000_000}, "fewer than one sample of sequence_length 10000000"),
        ({"eod_mask_loss": True}, "eod_mask_loss needs to know .* set data.tokenizer"),
        ({"tokenizer": "/nowhere"}, "cannot read the tokenizer /nowhere"),
    ],
)
def test_mistakes_are_named(data, changes, message):
    with pytest.raises(UserError, match=message):
        build(replace(data, **changes), 10, 1)


def test_a_vocabulary_that_is_too_small_is_named(data):
    with pytest.raises(UserError, match="outside the model's vocabulary of 1000"):
        build(data, vocab_size=1000)
