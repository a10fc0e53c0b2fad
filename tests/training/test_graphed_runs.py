"""Whole runs whose steps are replayed: with bad data and a return to a checkpoint, stopped and
resumed, and on ranks that record at different steps. Each has the losses of a run without a
graph."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.stream import SampleStream
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking import ledger
from tests.distributed import run_on_bad_data
from tests.distributed.test_spikes import BATCH, samples_of
from tests.distributed.toy import losses, toy_config, write_dataset
from tests.ranks import run_ranks
from tests.training.rehearsal import launched, rehearsed


def write_documents(folder: Path) -> str:
    """Of 1 to 60 tokens, the same on every machine: how many a rank meets must differ."""
    numbers, prefix = np.random.default_rng(5), str(folder / "text")
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in numbers.integers(1, 60, 400):
            writer.add_document(numbers.integers(1, 256, length))
        writer.finish()
    return prefix


def test_bad_data_and_a_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 5 is not a number, 11 and 12 are outliers: back to 8, and recorded anew from there."""
    monkeypatch.setattr(SampleStream, "_read", SampleStream._read)  # as it was, afterwards
    run_on_bad_data.break_samples(SampleStream)
    monkeypatch.setitem(run_on_bad_data.BAD, "nan", {5 * BATCH - 1})
    monkeypatch.setitem(run_on_bad_data.BAD, "absurd", set(samples_of(11, 12)))
    prefix = write_dataset(tmp_path)
    fields: dict[str, Any] = {
        "training.train_steps": 16,
        "checkpoint.save_interval": 4,
        "faults.skip_spikes": True,
        "faults.spike_window": 16,
        "faults.spike_zscore": 4.0,
        "faults.max_skips_in_row": 2,
    }
    launched(toy_config(prefix, tmp_path / "launched", **fields))
    rehearsal = rehearsed(toy_config(prefix, tmp_path / "replayed", **fields))
    for kind, steps in (("skipped", [5, 11, 12]), ("rollback", [8])):
        for name in ("launched", "replayed"):
            assert [event["step"] for event in ledger.read(tmp_path / name, kind)] == steps
    one_by_one = losses(tmp_path / "launched")
    assert losses(tmp_path / "replayed") == one_by_one and len(set(one_by_one)) == 15
    # What is not finite is computed twice; and after the return, two steps warm up again.
    assert (rehearsal.recorded_at, rehearsal.replayed) == ([3, 16], 17)
    assert rehearsal.calls == 12 + 1 + 8


def test_stopped_and_resumed(tmp_path: Path) -> None:
    """Stopped where the batch grows: the second process records its four micro-batches only."""
    prefix = write_dataset(tmp_path)
    fields: dict[str, Any] = {
        "training.train_steps": 9,
        "training.rampup_start_batch_size": 4,
        "training.rampup_batch_size_increment": 4,
        "training.rampup_tokens": 16 * 64,
    }
    launched(toy_config(prefix, tmp_path / "launched", **fields))
    whole = rehearsed(toy_config(prefix, tmp_path / "whole", **fields))
    parts = toy_config(prefix, tmp_path / "parts", **fields)
    first = rehearsed({**parts, "training.exit_step": 4}, ExitCode.REQUEUE)
    second = rehearsed(parts)
    one_by_one = losses(tmp_path / "launched")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") == one_by_one
    assert len(set(one_by_one)) == 9
    assert (whole.micro_batches, whole.recorded_at) == ([2, 4], [3, 7])
    assert (first.micro_batches, first.recorded_at, first.calls) == ([2], [3], 4)
    assert (second.micro_batches, second.recorded_at, second.calls) == ([4], [3], 5)


def test_ranks_record_at_different_steps(tmp_path: Path) -> None:
    """Each rank has room for the documents that it has met: one records while the other replays."""
    fields: dict[str, Any] = {
        "data.reset_at_document_boundaries": True,
        "training.train_steps": 14,
        "training.seed": 39,  # by which one rank meets more documents more often than the other
    }
    config = toy_config(write_documents(tmp_path), tmp_path / "launched", **fields)
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_ranks("tests.training.graphed_ranks", 2, tmp_path)
    one_by_one = losses(tmp_path / "launched")
    assert losses(tmp_path / "replayed") == one_by_one and len(set(one_by_one)) == 14
    recorded_at = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert recorded_at == [[3], [3, 6, 10]]
