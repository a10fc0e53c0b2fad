"""Packing by best fit: nothing lost, nothing twice, no document cut that fits, little padding."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.config.data import DataConfig
from samba_megatron.data.best_fit import pack, packed_size
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.data.indexed import IndexedWriter, sequence_lengths
from samba_megatron.platform.errors import UserError

LENGTH = 16


def one_by_one(pieces: list[int], capacity: int) -> list[int]:
    """What is left in each sample when pieces are placed, the longest first, by best fit."""
    left: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [(room, number) for number, room in enumerate(left) if room >= piece]
        if fitting:
            left[min(fitting)[1]] -= piece
        else:
            left.append(capacity - piece)
    return sorted(left)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(0, 70), max_size=60), sequence_length=st.integers(1, 40))
def test_samples_are_those_of_placing_one_by_one(lengths, sequence_length):
    documents = np.arange(10, 10 + len(lengths), dtype=np.int32)
    sizes = np.array(lengths, np.int32)
    packed = pack(documents, sizes, sequence_length)
    rooms: list[int] = []
    seen: Counter[tuple[int, int]] = Counter()
    for first, last in zip(packed.starts, packed.starts[1:], strict=False):
        room = sequence_length
        for document, offset in zip(
            packed.documents[first:last], packed.offsets[first:last], strict=True
        ):
            count = min(lengths[document - 10] - 1 - offset, sequence_length)
            assert count > 0 and offset % sequence_length == 0
            seen.update((int(document), int(offset) + i) for i in range(count))
            room -= count
        assert 0 <= room < sequence_length
        rooms.append(room)
    # Every position from which there is something to predict, once.
    assert seen == Counter((n + 10, i) for n, size in enumerate(lengths) for i in range(size - 1))
    positions = [size - 1 for size in lengths if size > 1]
    whole = sum(n // sequence_length for n in positions)
    rests = [n % sequence_length for n in positions if n % sequence_length]
    assert sorted(rooms) == sorted([0] * whole + one_by_one(rests, sequence_length))
    size = packed_size(sizes, sequence_length)
    assert size == (len(rooms), len(packed.documents), sum(positions))


def write(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of which each token says the document's number and its place in it."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths, first):
            writer.add_document(np.arange(64 * number, 64 * number + length))
        writer.finish()
    return str(prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(2)
    prefixes = [
        write(folder / name, random.integers(1, 60, 90).tolist(), first)
        for name, first in (("a", 0), ("b", 200))
    ]
    return DataConfig(
        prefixes, sequence_length=LENGTH, split="1", path_to_cache=str(folder), packing="best_fit"
    )


def build(data: DataConfig, samples: int, **more):
    return build_train_and_valid(data, samples, 0, 7, **more)[0]


def test_samples_hold_documents_whole_and_say_what_counts(data):
    dataset = build(data, 120)
    assert 0 < float(dict(dataset.summary())["padding"].removesuffix("%")) < 5
    for index in range(120):
        sample = dataset[index]
        tokens, labels, counted = sample["tokens"], sample["labels"], sample["loss_mask"] == 1
        filled = int(counted.sum())
        assert counted[:filled].all() and filled > 0
        assert torch.equal(labels[:filled], tokens[:filled] + 1)  # never another document's
        starts = torch.zeros(LENGTH, dtype=torch.bool)
        starts[1:filled] = tokens[1:filled] != tokens[: filled - 1] + 1
        starts[[0, filled] if filled < LENGTH else [0]] = True
        assert torch.equal(sample["document_start"], starts)
        assert torch.equal(dataset.boundaries(index)["document_start"], starts)
        # A piece that does not begin its document follows whole samples of it.
        assert (tokens[:filled][starts[:filled]] % 64 % LENGTH == 0).all()


def test_each_pass_has_everything_once_and_is_another(data):
    alone = replace(data, data_path=data.data_path[:1])
    (prefix,) = alone.data_path
    one_pass = packed_size(sequence_lengths(prefix), LENGTH).samples
    dataset = build(alone, 3 * one_pass)
    seen = []
    for number in range(3):
        samples = [dataset[number * one_pass + index] for index in range(one_pass)]
        tokens = torch.cat([s["tokens"][s["loss_mask"] == 1] for s in samples]).tolist()
        assert len(set(tokens)) == len(tokens)
        seen.append(tokens)
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(seen[2])
    assert seen[0] != seen[1]
    ledger = dataset.ledger(3 * one_pass)
    assert dataset.consumed_by_source(3 * one_pass)[prefix]["epochs"] == 3
    assert [entry["samples"] for entry in ledger["sources"].values()] == [3 * one_pass]


def test_a_run_that_goes_on_has_the_samples_of_the_uninterrupted_one(data):
    whole = build(data, 60)
    resumed = build(data, 60, consumed=whole.ledger(25))
    for index in range(25, 60):
        assert torch.equal(whole[index]["tokens"], resumed[index]["tokens"])
        assert torch.equal(whole[index]["loss_mask"], resumed[index]["loss_mask"])


@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_padding_is_small_where_documents_vary(seed):
    """The usual case: a lognormal crowd of documents around a quarter of a sample."""
    random = np.random.default_rng(seed)
    lengths = np.exp(random.normal(6.9, 1.0, 5000)).astype(np.int32) + 2
    size = packed_size(lengths, 4096)
    assert size.positions > 0.999 * 4096 * (size.samples - 1)


def test_documents_without_anything_to_predict_are_refused(data, tmp_path):
    single = write(tmp_path / "single", [1] * 40)
    with pytest.raises(UserError, match="single has no document of two tokens"):
        build(replace(data, data_path=[single]), 1)
