"""A profile of real steps, and what its tables say."""

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils.checkpoint import checkpoint

from samba_megatron.config.logging import LoggingConfig
from samba_megatron.training.profiling import StepProfiler
from tests.distributed.toy import launch, toy_config, write_dataset

JOIN = "TransformerLayer > SambaSelfAttention > SplitWithSizesBackward0 > aten::cat"


def test_a_run_profiles_the_steps_that_it_is_asked_to(tmp_path: Path) -> None:
    fields = {"logging.profile_step_start": 2, "logging.profile_step_end": 4}
    fields["logging.profile_shapes"] = True
    config = toy_config(write_dataset(tmp_path), tmp_path / "run", **fields)
    launch(1, [{"name": "profiled", "config": {**config, "training.train_steps": 4}}], tmp_path)
    folder = tmp_path / "run" / "profile" / "rank_0"
    times = json.loads((folder / "kernels.json").read_text())
    assert times["steps"] == 2
    assert times["kinds"]["matrix products"] > 0
    assert sum(times["kinds"].values()) == pytest.approx(
        sum(kernel["milliseconds"] for kernel in times["kernels"])
    )
    # 4 micro-batches, 2 MLPs and 2 attentions of 2 linears each, forward and twice backward.
    products = sum(k["calls"] for k in times["kernels"] if k["name"] in ("aten::mm", "aten::addmm"))
    assert products >= 4 * (2 * 2 * 2 + 2 * 2) * 3
    assert "matrix products" in (folder / "kernels.txt").read_text()
    unnamed = [row for row in times["operators"] if row["kind"] == "copies"]
    assert sum(row["milliseconds"] for row in unnamed) == pytest.approx(times["kinds"]["copies"])
    # 4 micro-batches and 2 attentions: the gradients of queries, keys and values are joined again.
    joins = [row for row in unnamed if row["operator"] == JOIN]
    assert [row["calls"] for row in joins] == [8.0]
    assert joins[0]["inputs"] == "TensorList[[64, 2, 2, 16], [64, 2, 2, 8], [64, 2, 2, 8]]"
    with gzip.open(folder / "trace.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


class Joins(nn.Module):
    """Joins what a linear layer gives, cast, to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[n, 6] → [n, 10]."""
        return torch.cat([inputs, self.linear(inputs).bfloat16().float()], dim=1)


def profiled(folder: Path, work: Callable[[], object], **fields: Any) -> dict[str, Any]:
    """The tables of one step of some work."""
    warnings: list[str] = []
    logging = LoggingConfig(profile_step_start=1, **fields)
    profiler = StepProfiler(logging, folder, 0, warnings.append)
    profiler.before(1)
    work()
    profiler.after(1)
    assert not warnings
    tables: dict[str, Any] = json.loads((folder / "profile/rank_0/kernels.json").read_text())
    return tables


def test_shapes_and_modules_are_recorded_on_request(tmp_path: Path) -> None:
    """Casts of the forward pass and of the backward pass, and of a forward within the backward."""
    net, inputs = nn.Sequential(Joins()), torch.randn(3, 6, requires_grad=True)

    def work() -> None:
        net(inputs).sum().backward()
        checkpoint(net, inputs, use_reentrant=True).sum().backward()

    without = {row["operator"] for row in profiled(tmp_path / "a", work)["operators"]}
    tables = profiled(tmp_path / "b", work, profile_shapes=True)
    rows = {(row["operator"], row["inputs"]): row["calls"] for row in tables["operators"]}
    cast = "aten::to > aten::copy_"
    assert cast in without and not any("Joins" in place for place in without)
    down, up = "bf16[3, 4], f32[3, 4]", "f32[3, 4], bf16[3, 4]"
    module, again = "Sequential > Joins > ", "CheckpointFunctionBackward > "
    assert rows[module + cast, down] == 1
    assert rows[module + again + cast, down] == 1
    assert rows[module + "ToCopyBackward0 > " + cast, up] == 1
    assert rows[module + again + "ToCopyBackward0 > " + cast, up] == 1


def test_a_profile_leaves_modules_as_they_were(tmp_path: Path) -> None:
    """Results are the same to the bit, hooks are gone, and a forward that fails ends its range."""
    net, inputs = Joins(), torch.randn(3, 6)
    before = net(inputs)
    results: list[torch.Tensor] = []

    def work() -> None:
        with pytest.raises(RuntimeError):
            net(torch.randn(3, 7))
        results.append(net(inputs))
        torch.ones(3).clone()

    rows = profiled(tmp_path, work, profile_shapes=True)["operators"]
    assert torch.equal(results[0], before)
    assert "aten::clone > aten::copy_" in {row["operator"] for row in rows}
    assert not _global_forward_hooks and not _global_forward_pre_hooks


@pytest.mark.gpu
def test_on_a_gpu_idle_time_and_copies_have_their_place(tmp_path: Path) -> None:
    """The host awaits a result, sleeps for 20 ms and goes on."""
    net, inputs = Joins().cuda(), torch.randn(512, 6, device="cuda")

    def work() -> None:
        net(inputs).sum().item()
        time.sleep(0.02)
        net(inputs).sum().backward()

    for _ in range(2):  # the second has gradients to add to
        work()
    torch.cuda.synchronize()
    tables = profiled(tmp_path, work, profile_shapes=True)
    idle = tables["idle"][0]
    assert idle["milliseconds"] > 15
    assert "aten::item" in next(iter(idle["host"]))
    assert tables["kinds"]["idle"] == pytest.approx(
        sum(row["milliseconds"] for row in tables["idle"])
    )
    rows = {(row["operator"], row["inputs"]): row["calls"] for row in tables["operators"]}
    assert rows["Joins > aten::to > aten::copy_", "bf16[512, 4], f32[512, 4]"] == 2
    assert "unknown" not in {row["launched_by"] for row in tables["idle"]}
