"""What test_account runs on two ranks: what a run says of its memory, layers, times and faults,
in several layouts of one small model. Rank 0 writes ``results.json``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from samba_megatron.config import PrecisionConfig, RunConfig
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import stage_memory
from samba_megatron.platform import distributed
from samba_megatron.training.fp8_health import Fp8Health, worst
from samba_megatron.training.layer_norms import LayerNorms
from samba_megatron.training.step import NonFiniteStep
from samba_megatron.training.timing import attach_timers
from tests.checkpoint.tiny_run import TinyRun, _micro_batches, start, tiny_config

WORLD, PATTERN = 2, "M-*- x2"
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "vpp2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
}


BOTH = ("fp32", "bf16")
DTYPES = {"dp2": BOTH, "tp2 sp": BOTH, "pp2": ("fp32",), "vpp2": ("fp32",)}


def main(folder: Path) -> None:
    results: dict[str, Any] = {}
    start(tiny_config())
    for name, sizes in LAYOUTS.items():
        for dtype in DTYPES[name]:
            config = tiny_config(dtype, pattern=PATTERN, **sizes)
            distributed.leave_layout()
            distributed.initialize(config.parallel)
            run = TinyRun(config)
            found = step(run)
            found["bytes"] = gathered(real_bytes(config, run))
            if dtype == "fp32":
                found["fp8"] = fp8_health(run)
            found["seconds"] = [gathered(seconds) for seconds in times(run)]
            if dtype == "fp32":
                found["gradient fault"] = gradient_fault(run)
                found["fault"] = fault(run)
            results[f"{name} {dtype}"] = found
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    distributed.shutdown()


def gathered(value: Any) -> list[Any]:
    return [json.loads(text) for text in distributed.gather_text(json.dumps(value))]


def step(run: TinyRun) -> dict[str, Any]:
    """One step and its layers' norms."""
    norms = LayerNorms(run.state.model, 1)
    layers: dict[str, Any] = {}
    with norms.watching(1):
        result = run.step(
            _micro_batches(0),
            before_update=lambda: layers.update(norms.collect()),
        )
    return {"grad_norm": result.grad_norm, "layers": layers}


def times(run: TinyRun) -> list[dict[str, float]]:
    """The parts' seconds of each of three further steps."""
    timers = attach_timers(run.state.model)
    return [run.step(_micro_batches(0), timers=timers).seconds for _ in range(3)]


def fp8_health(run: TinyRun) -> dict[str, Any]:
    """What FP8 would make of a step's products, had the linears Transformer Engine's mark; every
    second weight of an MLP's way in is too small for its block."""
    for chunk in run.state.model:
        for name, module in chunk.module.named_modules():
            if name.endswith(("in_proj", "out_proj", "linear_qkv", "linear_proj", "fc1", "fc2")):
                module.fp8_meta = {}
            if name.endswith("fc1"):
                module.weight.data[:, ::2] *= 1e-9
    health = Fp8Health(run.state.model, PrecisionConfig(fp8="e4m3", fp8_recipe="mxfp8"), 1)
    record: dict[str, Any] = {}
    with health.watching(1):
        run.step(
            _micro_batches(0),
            before_update=lambda: record.update(health.collect()),
        )
    return record | {"worst": worst(record)}


def real_bytes(config: RunConfig, run: TinyRun) -> dict[str, Any]:
    """(what is there, what the planner says) of this rank, after a step."""
    layout = Layout(config, WORLD)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    planned = stage_memory(layout, stage)
    buffers = [buffer for chunk in run.state.model for buffer in chunk.buffers]
    parameters = [p for buffer in buffers for p in buffer.params]
    optimizer = run.state.optimizer
    return {
        "weights": sum(p.numel() * p.element_size() for p in parameters),
        "gradients": sum(
            p.numel() * buffer.grad_data.element_size() for buffer in buffers for p in buffer.params
        ),
        "buffers": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "numbers": len(parameters),
        "buckets": sum(len(buffer.buckets) for buffer in buffers),
        "optimizer": optimizer_bytes(optimizer),
        "group": torch.distributed.get_process_group_ranks(
            parallel_state.get_data_parallel_group(with_context_parallel=True)
        ),
        "planned": {name: getattr(planned, name) for name in ("weights", "gradients", "optimizer")},
    }


def optimizer_bytes(optimizer: Any) -> int:
    """Moments, and the fp32 copies of bf16 parameters."""
    tensors: list[torch.Tensor] = []
    for part in optimizer.chained_optimizers:
        for states in part.optimizer.state.values():
            tensors += [states["exp_avg"], states["exp_avg_sq"]]
        tensors += [t for group in part.shard_fp32_from_float16_groups for t in group]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def fault(run: TinyRun) -> str:
    """What a step says when the second Mamba layer (number 5) has a weight that is not finite."""
    with torch.no_grad():
        for parameter in parameters(run, 5, "out_proj.weight"):
            parameter[0, 0] = float("nan")
    return reason(run)


def gradient_fault(run: TinyRun) -> str:
    """What a step says when its loss is finite, and a gradient of the second MLP is not."""
    hooks = [
        parameter.register_hook(lambda gradient: gradient * float("inf"))
        for parameter in parameters(run, 4, "linear_fc2.weight")
    ]
    found = reason(run)
    for hook in hooks:
        hook.remove()
    return found


def parameters(run: TinyRun, number: int, ending: str) -> list[torch.nn.Parameter]:
    """A layer's parameters on this rank; none where it is elsewhere."""
    return [
        parameter
        for chunk in run.state.model
        for layer in chunk.module.decoder.layers
        if layer.layer_number == number
        for name, parameter in layer.named_parameters()
        if name.endswith(ending)
    ]


def reason(run: TinyRun) -> str:
    try:
        run.step(_micro_batches(1))
    except NonFiniteStep as bad:
        return bad.reason
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
