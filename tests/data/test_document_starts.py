"""Samples know where documents begin, from how they are joined: no token says so."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.config.data import DataConfig
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.data.held_out import held_out_blocks
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.stream import Batch, BoundariesOnly, SampleStream, evaluation_batches

LENGTH = 16
LONG = 3 * LENGTH
"""Tokens of a document at the most: 64 numbers are kept apart for each."""


def write(prefix: Path, lengths: list[int], first: int = 0) -> str:
    """Documents of which each token says the document's number and its place in it."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths, first):
            writer.add_document(np.arange(64 * number, 64 * number + length))
        writer.finish()
    return str(prefix)


def starts_of(tokens: torch.Tensor) -> torch.Tensor:
    """What ``document_start`` must be, by the tokens."""
    start = tokens % 64 == 0
    start[..., 0] = True
    return start


def field(batch: Batch, name: str) -> torch.Tensor:
    """A field that must be there."""
    value = batch[name]
    assert value is not None
    return value


def build(prefixes: list[str], folder: Path, samples: int, apart: bool = True):
    data = DataConfig(
        prefixes,
        sequence_length=LENGTH,
        split="1",
        path_to_cache=str(folder),
        reset_at_document_boundaries=apart,
    )
    return build_train_and_valid(data, samples, 0, 7)[0]


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Two sources of documents of 1 to 48 tokens: shorter than a sample, as long, and longer."""
    folder = tmp_path_factory.mktemp("documents")
    random = np.random.default_rng(1)
    return [
        write(folder / name, random.integers(1, LONG + 1, 120).tolist(), first)
        for name, first in (("a", 0), ("b", 200))
    ]


def test_training_samples_say_where_documents_begin(sources, tmp_path):
    dataset = build(sources, tmp_path, 400)
    seen = torch.stack([dataset[index]["tokens"] for index in range(400)])
    found = torch.stack([dataset[index]["document_start"] for index in range(400)])
    assert found.dtype == torch.bool
    assert torch.equal(found, starts_of(seen))
    assert (found.sum(1) == 1).any() and (found.sum(1) > 3).any()


@settings(max_examples=15)
@given(st.lists(st.sampled_from([1, 2, LENGTH - 1, LENGTH, LENGTH + 1, LONG]), min_size=20))
def test_held_out_blocks_say_where_documents_begin(tmp_path_factory, lengths):
    prefix = write(tmp_path_factory.mktemp("held_out") / "d", lengths)
    for length in (5, LENGTH):
        blocks = held_out_blocks([prefix], length, reset_at_document_boundaries=True)
        for block in (blocks[index] for index in range(len(blocks))):
            assert torch.equal(block["document_start"], starts_of(block["tokens"]))


def test_nothing_is_said_where_documents_see_each_other(sources, tmp_path):
    assert "document_start" not in build(sources, tmp_path, 10, apart=False)[0]
    assert build(sources, tmp_path, 10, apart=False).boundaries(0) == {}
    assert "document_start" not in held_out_blocks(sources, LENGTH)[0]


def test_a_stage_between_reads_the_same_boundaries_and_no_tokens(sources, tmp_path):
    whole = SampleStream(build(sources, tmp_path, 24), 2, 1, 2, 4)
    between = SampleStream(BoundariesOnly(build(sources, tmp_path, 24)), 2, 1, 2, 4)
    for one, other in zip(whole.next_global_batch(20), between.next_global_batch(20), strict=True):
        assert other.keys() == {"document_start", "attention_mask"}
        assert torch.equal(field(one, "document_start"), field(other, "document_start"))
    for stream in (whole, between):
        stream.close()


def test_validation_batches_have_them(sources):
    blocks = held_out_blocks(sources, LENGTH, 7, reset_at_document_boundaries=True)
    for batch in evaluation_batches(blocks, 3, 0, 1):
        assert torch.equal(field(batch, "document_start"), starts_of(field(batch, "tokens")))
