"""Which checkpoints Transformer Engine is told to trust: its FP8 state may be a pickle."""

import os
from pathlib import Path

import pytest

from samba_megatron.checkpoint.store import CheckpointStore
from samba_megatron.platform import distributed
from tests.checkpoint.tiny_run import TinyRun, start, store_in, tiny_config

TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def test_a_run_trusts_its_own_checkpoints_also_when_it_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = CheckpointStore._read, []

    def noting(*arguments: object) -> object:
        seen.append(os.environ.get(TRUST))
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "_read", noting)
    monkeypatch.setenv(TRUST, "")  # So that it is gone after the test, whatever was set in it.
    start(tiny_config())
    try:
        run = TinyRun(tiny_config())
        run.train(1)
        own = store_in(tmp_path / "own")
        own.save(run.state, blocking=True)
        run.train(2)

        monkeypatch.delenv(TRUST)
        run.load(store_in(tmp_path / "new", load=str(tmp_path / "own")))
        assert seen == [None], "a checkpoint of another run"
        assert own.go_back(run.state, 1) is not None
        monkeypatch.delenv(TRUST)
        run.load(own)
        assert seen == [None, "1", "1"]
    finally:
        distributed.leave_layout()
