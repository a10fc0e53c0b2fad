"""The order inside a source is Megatron's, its cache is shared, a broken pack is built again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index

from samba_megatron.data import sample_index
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.sample_index import OrderCache, SourcePart, epoch_order, order_key
from samba_megatron.platform.errors import UserError


def write(prefix: Path, lengths: list[int]) -> SourcePart:
    with IndexedWriter(prefix, np.uint16) as writer:
        for number, length in enumerate(lengths):
            writer.add_document(np.full(length, number))
        writer.finish()
    return SourcePart("d", str(prefix), f"{prefix}", 0, len(lengths), sum(lengths))


def same(left, right) -> bool:
    names = ("documents", "starts", "offsets", "shuffle")
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in names)


def first_token(sizes: np.ndarray, place: int, offset: int) -> tuple[int, int]:
    """The same place in the text, past the ends of documents."""
    while offset >= sizes[place]:
        place, offset = place + 1, offset - int(sizes[place])
    return place, offset


@settings(max_examples=80)
@example(lengths=[0, 31], part=(0.0, 1.0), sequence_length=2, epoch=0)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda n: sum(n) > 30),
    part=st.tuples(st.floats(0, 0.3), st.floats(0.7, 1)),
    sequence_length=st.integers(2, 25),
    epoch=st.integers(0, 3),
)
def test_an_epoch_is_megatrons(tmp_path_factory, lengths, part, sequence_length, epoch):
    whole = write(tmp_path_factory.mktemp("d") / "d", lengths)
    first, last = (round(end * len(lengths)) for end in part)
    tokens = sum(lengths[first:last])
    if tokens <= sequence_length:
        return
    order = epoch_order(
        replace(whole, first=first, last=last, tokens=tokens), epoch, sequence_length, 1234
    )
    random = np.random.RandomState(1234 + epoch)
    documents = _build_document_index(np.arange(first, last, dtype=np.int32), 1, random, False)
    sizes = np.array(lengths, np.int32)
    samples = helpers.build_sample_idx(sizes, documents, sequence_length, 1, tokens, True, 1)
    shuffle = _build_shuffle_index(len(samples) - 1, len(samples) - 1, random)
    assert np.array_equal(order.documents, documents)
    assert np.array_equal(order.shuffle, shuffle)
    # Megatron ends at the last token of the last document that it needs, or at the next one's
    # first, and may begin at a document without tokens: where the first token lies is what counts.
    ours, theirs = zip(order.starts, order.offsets, strict=True), samples.tolist()
    first_tokens = [first_token(sizes[documents], *start) for start in theirs[:-1]]
    assert [tuple(map(int, start)) for start in ours][:-1] == first_tokens


def test_a_pack_holds_many_orders_and_only_what_is_missing_is_built(tmp_path):
    parts = [write(tmp_path / f"d{number}", [7, 9, 5 + number]) for number in range(5)]
    cache = OrderCache(tmp_path / "cache")
    stored = cache.ensure([(part, 0) for part in parts[:3]], 4, 1)
    again = OrderCache(tmp_path / "cache").ensure(
        [(part, e) for part in parts for e in (0, 1)], 4, 1
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert stored.items() <= again.items()
    for part in parts:
        for epoch in (0, 1):
            found = cache.load(again[order_key(part, epoch, 4, 1)])
            assert same(found, epoch_order(part, epoch, 4, 1))
    assert len({entry.pack for entry in again.values()}) == 2


def test_processes_build_the_same_pack(tmp_path, monkeypatch):
    wanted = [(write(tmp_path / f"d{number}", [9, 20 + number]), 0) for number in range(4)]
    (alone,) = {s.pack for s in OrderCache(tmp_path / "1").ensure(wanted, 4, 1).values()}
    monkeypatch.setattr(sample_index, "_PARALLEL_FROM", 1)
    (shared,) = {s.pack for s in OrderCache(tmp_path / "2").ensure(wanted, 4, 1).values()}
    assert (tmp_path / "1" / alone).read_bytes() == (tmp_path / "2" / shared).read_bytes()


def test_a_broken_pack_is_passed_over_and_built_again(tmp_path):
    part = write(tmp_path / "d", [20, 20])
    cache = OrderCache(tmp_path / "cache")
    (stored,) = cache.ensure([(part, 0)], 4, 1).values()
    pack = tmp_path / "cache" / stored.pack
    whole = pack.read_bytes()
    (tmp_path / "cache" / "foreign.pack").write_bytes(b"x" * 100)
    (tmp_path / "cache" / "empty.pack").write_bytes(b"")
    for broken in (whole[:-1], whole[:20], b""):
        pack.write_bytes(broken)
        assert OrderCache(tmp_path / "cache").ensure([(part, 0)], 4, 1) == {
            order_key(part, 0, 4, 1): stored
        }
        assert pack.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"cannot write the index cache .* data.path_to_cache"):
        OrderCache(tmp_path / "cache").ensure([(write(tmp_path / "d", [20]), 0)], 4, 1)
