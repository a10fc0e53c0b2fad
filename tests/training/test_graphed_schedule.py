"""A step that is recorded and replayed: the same losses, whatever the batches. Without a GPU a
recording is the function itself, run again: what is tested is that a step reads nothing but the
memory that it was recorded with, and that what is put off is done."""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.data.stream import Batch
from samba_megatron.training import graphed_schedule
from samba_megatron.training.graphed_schedule import StaticInputs
from tests.distributed.toy import losses, toy_config, write_dataset, write_short_documents
from tests.training.rehearsal import Rehearsal, launched, rehearsed

STEPS = 8
APART = {"data.reset_at_document_boundaries": True}
RAMP = {
    "training.rampup_start_batch_size": 4,
    "training.rampup_batch_size_increment": 4,
    "training.rampup_tokens": 16 * 64,
}


def run_both(
    folder: Path, prefix: str, **fields: Any
) -> tuple[list[float], list[float], Rehearsal]:
    """Losses launched and replayed, and how the latter came about."""
    fields = {"training.train_steps": STEPS, **fields}
    launched(toy_config(prefix, folder / "launched", **fields))
    rehearsal = rehearsed(toy_config(prefix, folder / "replayed", **fields))
    return losses(folder / "launched"), losses(folder / "replayed"), rehearsal


def test_replays_are_the_steps(tmp_path: Path) -> None:
    one_by_one, replayed, rehearsal = run_both(tmp_path, write_dataset(tmp_path))
    assert replayed == one_by_one and len(set(one_by_one)) == STEPS
    assert (rehearsal.recorded_at, rehearsal.replayed) == ([3], STEPS - 2), "two steps warm up"


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_documents_apart(micro_batch_size: int, tmp_path: Path) -> None:
    fields = {**APART, "training.micro_batch_size": micro_batch_size}
    one_by_one, replayed, rehearsal = run_both(tmp_path, write_short_documents(tmp_path), **fields)
    assert replayed == one_by_one and rehearsal.recorded_at == [3]


def test_validations_and_saves_between(tmp_path: Path) -> None:
    """They use the same weights, on other batches, and leave the graph what it was."""
    fields = {
        **APART,
        "validation.eval_interval": 4,
        "validation.eval_tokens": 1024,
        "data.split": "90,10,0",
        "checkpoint.save_interval": 5,
    }
    one_by_one, replayed, rehearsal = run_both(tmp_path, write_short_documents(tmp_path), **fields)
    assert replayed == one_by_one
    held_out = losses(tmp_path / "replayed", "validation")
    assert held_out == losses(tmp_path / "launched", "validation") and len(held_out) == 1
    assert (tmp_path / "replayed" / "checkpoints" / "step_0000005").is_dir()
    assert (rehearsal.recorded_at, rehearsal.replayed) == ([3], STEPS - 2)


def test_another_number_of_micro_batches(tmp_path: Path) -> None:
    one_by_one, replayed, rehearsal = run_both(tmp_path, write_dataset(tmp_path), **RAMP)
    assert replayed == one_by_one and rehearsal.micro_batches == [2, 4]
    assert rehearsal.recorded_at == [3, 7], "the larger batch warms up, too"


def test_more_documents_than_there_was_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_schedule, "_LEAST_ROOM", 1)
    monkeypatch.setattr(graphed_schedule, "_room", lambda documents: documents)
    fields = {**APART, "training.seed": 7}  # the first batch has not the most documents
    one_by_one, replayed, rehearsal = run_both(tmp_path, write_short_documents(tmp_path), **fields)
    assert replayed == one_by_one
    assert 0 < rehearsal.replayed < STEPS - 2, "each time it warms up again"


def batch(*documents: int) -> Batch:
    """One sequence of twelve tokens, with documents beginning there."""
    start = torch.zeros(1, 12, dtype=torch.bool)
    start[0, list(documents)] = True
    fields = dict.fromkeys(("tokens", "labels", "position_ids"), torch.arange(12)[None])
    return {**fields, "loss_mask": torch.ones(1, 12), "document_start": start}


def test_the_memory_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed_schedule, "_LEAST_ROOM", 4)
    inputs = StaticInputs([batch(0, 5)], end_to_end=False)
    sequence = inputs.micro_batches[0].sequence
    assert sequence is not None and sequence.reset is not None
    packed = sequence.packed(slice(0, 12), 12)
    assert packed is not None and packed.query_ends.tolist() == [0, 5, 12, 12, 12]
    assert packed.most_queries == packed.most_keys == 12, "whatever documents come"
    places = [sequence.reset.data_ptr(), packed.query_ends.data_ptr(), packed.key_ends.data_ptr()]
    other = batch(3, 7, 10)
    assert inputs.fits([other])
    inputs.fill([other])
    assert sequence.packed(slice(0, 12), 12) is packed
    assert packed.query_ends.tolist() == packed.key_ends.tolist() == [0, 3, 7, 10, 12]
    assert sequence.reset[:, 0].nonzero().flatten().tolist() == [3, 7, 10]
    assert places == [x.data_ptr() for x in (sequence.reset, packed.query_ends, packed.key_ends)]
    assert not inputs.fits([batch(1, 2, 3, 4)]), "five documents, the first unmarked"
    assert not inputs.fits([other, other])
