"""How often a step has the host wait for the device: whatever reads a number of a tensor does."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from samba_megatron.platform.exits import ExitCode
from samba_megatron.training import loop
from samba_megatron.training.entry import train
from samba_megatron.training.signals import StopRequest
from tests.distributed.run_layouts import configure
from tests.distributed.toy import losses, toy_config, write_dataset

STEPS = 6
READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
}


class Waits(TorchFunctionMode):
    """Counts numbers read, within steps and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.within: list[int] = []
        self.between: list[int] = []
        self.in_step = False

    def begin(self) -> None:
        """A step begins."""
        self.within.append(0)
        self.in_step = True

    def end(self) -> None:
        """The device has been given the update of the weights."""
        self.in_step = False
        self.between.append(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS and self.within:
            counts = self.within if self.in_step else self.between
            counts[-1] += 1
        return func(*args, **(kwargs or {}))


def run_counted(
    waits: Waits, folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> list[float]:
    """Losses of a toy run in this process."""
    step = loop.train_step

    def counted(chunks: Any, optimizer: Any, *arguments: Any, **named: Any) -> Any:
        update = optimizer.step
        waits.begin()

        def updated() -> Any:
            done, norm, zeros = update()
            waits.end()
            return done, torch.tensor(norm), zeros  # as on a GPU, not read yet

        with monkeypatch.context() as patched:
            patched.setattr(optimizer, "step", updated)
            return step(chunks, optimizer, *arguments, **named)

    monkeypatch.setattr(loop, "train_step", counted)
    prefix = write_dataset(folder)
    config = toy_config(prefix, folder / "run", **{"training.train_steps": STEPS, **fields})
    with waits:
        assert train(configure(config)) == ExitCode.DONE
    return losses(folder / "run")


def test_nothing_waits_between_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has the next step's first kernels while it still updates the weights."""
    waits = Waits()
    found = run_counted(waits, tmp_path, monkeypatch)
    assert len(found) == STEPS and all(map(math.isfinite, found))
    assert len(waits.between) == STEPS and min(waits.within) > 0
    assert waits.between[:-1] == [0] * (STEPS - 1), "the last is followed by the run's end"


def test_ranks_agree_after_what_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save may take longer than a step: whoever asked for a stop meanwhile is heard at once."""
    agreed, agree = list[int](), StopRequest.agree

    def noted(stop: StopRequest) -> None:
        agreed.append(len(waits.between))
        agree(stop)

    monkeypatch.setattr(StopRequest, "agree", noted)
    waits = Waits()
    run_counted(waits, tmp_path, monkeypatch, **{"checkpoint.save_interval": 3})
    assert agreed == [0, 3], "before the first step and after the save in the middle"
    assert waits.between[:2] == [0, 0] and waits.between[2] > 0
