"""The order of samples depends on nothing but their number."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.data.stream import Batch, Piece, SampleStream, evaluation_batches
from samba_megatron.platform.errors import UserError


class Numbered:
    """Sample ``i`` is filled with ``i``; remembers what was read, by which thread."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read: list[tuple[int, bool]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        self.read.append((index, threading.current_thread() is threading.main_thread()))
        return {
            "tokens": torch.full((4,), index),
            "labels": torch.full((4,), index + 1),
            "loss_mask": torch.ones(4),
            "position_ids": torch.arange(4),
        }


def tensor(batch: Batch, name: str) -> torch.Tensor:
    value = batch[name]
    assert value is not None
    return value


def numbers(batch: Batch) -> list[int]:
    return tensor(batch, "tokens")[:, 0].tolist()


def steps(dp: int, micro: int, sizes: list[int], consumed: int = 0, **options) -> list[list[int]]:
    """The samples of each step, put together from all ranks in Megatron's order."""
    data = Numbered(1000)
    streams = [SampleStream(data, micro, rank, dp, consumed, **options) for rank in range(dp)]
    taken = []
    for size in sizes:
        per_rank = [[numbers(batch) for batch in s.next_global_batch(size)] for s in streams]
        taken.append([n for micros in zip(*per_rank, strict=True) for part in micros for n in part])
    for stream in streams:
        assert stream.consumed_samples == consumed + sum(sizes)
        stream.close()
    return taken


def expected_steps(sizes: list[int], consumed: int = 0) -> list[list[int]]:
    ends = [consumed + sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]


@settings(max_examples=50)
@given(
    dp=st.sampled_from([1, 2, 4]),
    micro=st.sampled_from([1, 2, 3]),
    multiples=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    consumed=st.integers(0, 50),
    read_ahead=st.integers(0, 3),
)
def test_order_does_not_depend_on_ranks_micro_batches_or_reading_ahead(
    dp, micro, multiples, consumed, read_ahead
):
    sizes = [24 * multiple for multiple in multiples]
    taken = steps(dp, micro, sizes, consumed, read_ahead=read_ahead)
    assert taken == expected_steps(sizes, consumed)


def test_a_rank_takes_megatrons_samples():
    stream = SampleStream(Numbered(100), 2, 1, 3, 12)
    assert [numbers(batch) for batch in stream.next_global_batch(12)] == [[14, 15], [20, 21]]


def test_a_resumed_stream_goes_on_where_the_first_stopped():
    whole = steps(2, 2, [8, 8, 16, 16])
    resumed = steps(4, 1, [16, 16], consumed=16)
    assert resumed == whole[2:]


def test_batches_have_the_training_loops_form():
    batch = next(SampleStream(Numbered(8), 2, 0, 1).next_global_batch(2))
    assert set(batch) == {"tokens", "labels", "loss_mask", "position_ids", "attention_mask"}
    assert batch["attention_mask"] is None
    for name in ("tokens", "labels", "position_ids"):
        assert tensor(batch, name).shape == (2, 4)
        assert tensor(batch, name).dtype == torch.int64
    assert tensor(batch, "loss_mask").dtype == torch.float32


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_next_micro_batch_is_read_in_the_background_but_not_all():
    data = Numbered(100)
    stream = SampleStream(data, 2, 0, 1, read_ahead=2)
    next(stream.next_global_batch(2))
    wait_until(lambda: len(data.read) == 6)
    time.sleep(0.02)
    assert len(data.read) == 6
    assert {index for index, in_main in data.read if not in_main} == {2, 3, 4, 5}
    taken = [numbers(batch) for batch in stream.next_global_batch(4)]
    assert taken == [[2, 3], [4, 5]]
    stream.close()
    assert len({index for index, _ in data.read}) == len(data.read)


def test_without_reading_ahead_nothing_more_is_read():
    data = Numbered(100)
    list(SampleStream(data, 2, 0, 1, read_ahead=0).next_global_batch(4))
    assert data.read == [(index, True) for index in range(4)]


def test_steps_left_unread_are_passed_over():
    stream = SampleStream(Numbered(100), 2, 0, 1, read_ahead=3)
    next(stream.next_global_batch(8))
    stream.next_global_batch(8)
    assert [numbers(batch) for batch in stream.next_global_batch(4)] == [[16, 17], [18, 19]]
    stream.close()


def test_an_error_while_reading_ahead_surfaces_at_its_micro_batch():
    class Failing(Numbered):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            if index == 3:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    batches = SampleStream(Failing(100), 1, 0, 1, read_ahead=4).next_global_batch(8)
    assert [numbers(next(batches)) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_an_uneven_global_batch_is_refused():
    with pytest.raises(UserError, match="global_batch_size 6 is not a multiple .* = 4"):
        SampleStream(Numbered(100), 2, 0, 2).next_global_batch(6)


def test_more_samples_than_there_are_is_refused():
    stream = SampleStream(Numbered(10), 1, 0, 2)
    assert len(list(stream.next_global_batch(10))) == 5
    with pytest.raises(UserError, match=r"samples 10\.\.11 were asked of a dataset of 10"):
        stream.next_global_batch(2)


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 3), (4, 2)])
def test_evaluation_reads_each_sample_once_in_equal_numbers(dp, micro):
    seen: list[int] = []
    counts = set()
    for rank in range(dp):
        batches = list(evaluation_batches(Numbered(13), micro, rank, dp))
        counts.add(len(batches))
        for batch in batches:
            assert tensor(batch, "tokens").shape == (micro, 4)
            real = tensor(batch, "loss_mask")[:, 0] == 1
            seen += tensor(batch, "tokens")[real, 0].tolist()
    assert sorted(seen) == list(range(13))
    assert len(counts) == 1


def test_ranks_that_share_sequences_have_a_piece_each_of_the_same_samples():
    whole = list(SampleStream(Numbered(8), 2, 0, 2).next_global_batch(8))
    pieces = [
        list(SampleStream(Numbered(8), 2, 0, 2, piece=Piece(n, 2)).next_global_batch(8))
        for n in range(2)
    ]
    for batch, *parts in zip(whole, *pieces, strict=True):
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            joined = torch.cat([tensor(part, name) for part in parts], dim=1)
            assert torch.equal(joined, tensor(batch, name)), name


def test_a_piece_leaves_document_starts_whole_and_refuses_what_it_cannot_cut():
    start = torch.ones(1, 6, dtype=torch.bool)
    cut = Piece(1, 3).cut({"tokens": torch.arange(6)[None], "document_start": start})
    assert tensor(cut, "tokens").tolist() == [[2, 3]]
    assert tensor(cut, "document_start") is start
    with pytest.raises(UserError, match="a sequence of 6 makes no 4 equal pieces"):
        Piece(0, 4).cut({"tokens": torch.arange(6)[None]})
