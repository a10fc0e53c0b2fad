"""A step that is recorded and replayed: the same losses, whatever the batches. Without a GPU a
recording is the function itself, run again: what is tested is that a step reads nothing but the
memory that it was recorded with, and that what is put off is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.utils import get_model_config

from samba_megatron.data.stream import Batch
from samba_megatron.platform.exits import ExitCode
from samba_megatron.training import graphed_schedule, loop
from samba_megatron.training.entry import train
from samba_megatron.training.graphed_schedule import GraphedSchedule, StaticInputs
from samba_megatron.training.schedule import Reports
from tests.distributed.run_layouts import configure
from tests.distributed.toy import losses, toy_config, write_dataset, write_short_documents

STEPS = 8
APART = {"data.reset_at_document_boundaries": True}
RAMP = {
    "training.rampup_start_batch_size": 4,
    "training.rampup_batch_size_increment": 4,
    "training.rampup_tokens": 16 * 64,
}


class Again:
    """Records a function by keeping it, and counts."""

    def __init__(self) -> None:
        self.config: Any = None
        self.recorded = self.replayed = 0

    def remember(self, chunk: Any) -> Any:
        """In the place of ``get_model_config``."""
        self.config = get_model_config(chunk)
        return self.config

    def __call__(self, run: Callable[[], Reports]) -> tuple[Reports, Callable[[], None]]:
        """As a CUDA graph: nothing is computed before the first replay."""
        self.recorded += 1
        reports: Reports = []
        put_off = self.config.finalize_model_grads_func
        assert self.config.timers is None, "nothing is timed in a recording"

        def replay() -> None:
            self.replayed += 1
            usual, self.config.finalize_model_grads_func = (
                self.config.finalize_model_grads_func,
                put_off,
            )
            reports[:] = run()
            self.config.finalize_model_grads_func = usual

        return reports, replay


def run_both(
    folder: Path, prefix: str, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> tuple[list[float], list[float], Again]:
    """Losses launched and replayed, and how the latter came about."""
    again = Again()
    for name in ("launched", "replayed"):
        config = toy_config(prefix, folder / name, **{"training.train_steps": STEPS, **fields})
        with monkeypatch.context() as patched:
            if name == "replayed":
                patched.setattr(loop, "run_schedule", GraphedSchedule(again))
                patched.setattr(graphed_schedule, "get_model_config", again.remember)
            assert train(configure(config)) == ExitCode.DONE
    return losses(folder / "launched"), losses(folder / "replayed"), again


def test_replays_are_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched, replayed, again = run_both(tmp_path, write_dataset(tmp_path), monkeypatch)
    assert replayed == launched and len(set(launched)) == STEPS
    assert (again.recorded, again.replayed) == (1, STEPS - 2), "two steps warm up"


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_documents_apart(
    micro_batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**APART, "training.micro_batch_size": micro_batch_size}
    prefix = write_short_documents(tmp_path)
    launched, replayed, again = run_both(tmp_path, prefix, monkeypatch, **fields)
    assert replayed == launched and again.recorded == 1


def test_another_number_of_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write_dataset(tmp_path)
    launched, replayed, again = run_both(tmp_path, prefix, monkeypatch, **RAMP)
    assert replayed == launched and again.recorded == 2
    assert again.replayed < STEPS - 2, "the larger batch warms up, too"


def test_more_documents_than_there_was_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_schedule, "_LEAST_ROOM", 1)
    monkeypatch.setattr(graphed_schedule, "_room", lambda documents: documents)
    prefix = write_short_documents(tmp_path)
    fields = {**APART, "training.seed": 7}  # the first batch has not the most documents
    launched, replayed, again = run_both(tmp_path, prefix, monkeypatch, **fields)
    assert replayed == launched
    assert again.replayed < STEPS - 2, "each time it warms up again"


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
