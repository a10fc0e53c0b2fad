"""Tries the libraries that training stands on: torch on its device, collectives, Transformer
Engine's layers in bf16 and FP8, megatron-core. Each is a trial of the child in
:mod:`samba_megatron.ops.trials`.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.measuring import (
    Inputs,
    activation,
    device,
    differentiate,
    judge,
    largest_error,
    milliseconds,
    on_gpu,
    output_weights,
)
from samba_megatron.ops.windowed_attention.reference import windowed_attention_reference
from samba_megatron.platform import matmul_rate, noise, nvidia_smi
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.hardware import device_name, peak_flops
from samba_megatron.platform.trials import Trial

LIBRARIES, KERNELS = "libraries", "kernels"
_FP8_TOLERANCE = 0.1
"""FP8 keeps 3 bits of a factor (2 of a gradient): of the largest of 1024-long sums."""
_FP8_CAPABILITY = (8, 9)


def before() -> Iterator[Trial]:
    """What the kernels need."""
    yield LIBRARIES, "torch", _torch
    yield LIBRARIES, "collectives", _collectives


def after() -> Iterator[Trial]:
    """What changes the process (megatron-core on a CPU), or takes long to import."""
    if on_gpu() and find_spec("transformer_engine") is not None:
        yield KERNELS, "Transformer Engine: linear bf16", partial(_te_linear, "bf16")
        for recipe in ("delayed", "tensorwise"):
            name = f"Transformer Engine: linear FP8 {recipe}"
            yield KERNELS, name, partial(_te_linear, f"FP8 {recipe}")
        yield KERNELS, "Transformer Engine: windowed attention", _te_attention
    yield LIBRARIES, "megatron-core", _megatron


def _torch() -> Finding:
    """A product of matrices on the device, twice the same."""
    gpus = len(nvidia_smi.query())
    if gpus and not on_gpu():
        why = "is built for the CPU" if torch.version.cuda is None else "cannot start CUDA"
        found = f"nvidia-smi finds {gpus} GPUs, and torch {torch.__version__} {why}"
        meaning = "training would run on the CPU: a driver too old for CUDA "
        meaning += f"{torch.version.cuda}, an empty CUDA_VISIBLE_DEVICES, or another torch"
        return Finding(LIBRARIES, "torch", State.BROKEN, found, meaning, "make setup")
    rates, problems = matmul_rate.measure()
    if problems:
        return Finding(LIBRARIES, "torch", State.BROKEN, "; ".join(problems))
    name, rate = device_name(), min(rate["tflops"] for rate in rates)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({built}) on {len(rates)} × {name}: {rate:.3g} TFLOP/s"
    peak = peak_flops(name, "bf16")
    meaning = f"of {peak / 1e12:.0f} in bf16" if peak else ""
    return Finding(LIBRARIES, "torch", State.OK, found, meaning, figures={"tflops": rate})


def _collectives() -> Finding:
    """One all-reduce in a world of one, through the library that training takes."""
    library = "nccl" if on_gpu() else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(library, store=store, rank=0, world_size=1)
    try:
        numbers = torch.ones(1024, device=device())
        torch.distributed.all_reduce(numbers)
        right = bool((numbers == 1).all())
    finally:
        torch.distributed.destroy_process_group()
    found = "gloo"
    if on_gpu():
        found = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    state = State.OK if right else State.BROKEN
    return Finding(LIBRARIES, "collectives", state, found, "between GPUs" * on_gpu())


def _megatron() -> Finding:
    """Imports what a run imports, as it does (on a CPU, through the shim)."""
    from samba_megatron.platform import cpu_shim

    with noise.quiet_imports():
        cpu_shim.install()
        noise.import_megatron()
    from megatron.core import optimizer

    found = f"{version('megatron-core')} is imported"
    meaning = f"AdamW: {optimizer.Adam.__module__.split('.')[0]}'s"
    return Finding(LIBRARIES, "megatron-core", State.OK, found, meaning)


def _te_linear(kind: str) -> Finding:
    """[2048, 1024] through a linear of 1024 by 1024, against fp64."""
    import transformer_engine.pytorch as te

    name = f"Transformer Engine: linear {kind}"
    if kind != "bf16" and torch.cuda.get_device_capability() < _FP8_CAPABILITY:
        meaning = "FP8 starts with compute capability 8.9 (Ada, Hopper)"
        return Finding(KERNELS, name, State.OFF, "this GPU has no FP8", meaning)
    layer = te.Linear(1024, 1024, bias=False, params_dtype=torch.bfloat16, device="cuda")
    inputs = {"x": activation(1, 2048, 1024)}

    def run(x: Tensor) -> Tensor:
        with _fp8(te, kind):
            return layer(x)

    def reference(x: Tensor) -> Tensor:
        return x @ layer.weight.detach().double().t()

    for _ in range(3):  # delayed scaling learns its factors from earlier calls
        _forward_backward(run, inputs)
    expected = differentiate(reference, {"x": inputs["x"].double()})
    error = largest_error(differentiate(run, inputs), expected)
    ms = milliseconds(lambda: _forward_backward(run, inputs))
    tolerance = 0.0 if kind == "bf16" else _FP8_TOLERANCE
    return judge(KERNELS, name, error, torch.bfloat16, ms, tolerance)


def _forward_backward(run: Any, inputs: Inputs) -> None:
    """With the weight's gradient, as in training, and the gradient that is compared."""
    y = run(inputs["x"].detach().requires_grad_())
    y.backward(output_weights(y))


def _fp8(te: Any, kind: str) -> Any:
    if kind == "bf16":
        return nullcontext()
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    recipe = DelayedScaling() if kind == "FP8 delayed" else Float8CurrentScaling()
    return te.fp8_autocast(enabled=True, fp8_recipe=recipe)


def _te_attention() -> Finding:
    """4 heads of 128 over 2 of keys, window 256 of 1024."""
    import transformer_engine.pytorch as te

    length, window = 1024, 256
    attention = te.DotProductAttention(
        4,
        128,
        num_gqa_groups=2,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=(window - 1, 0),
    )
    inputs = {
        "q": activation(1, length, 2, 4, 128),
        "k": activation(2, length, 2, 2, 128),
        "v": activation(3, length, 2, 2, 128),
    }
    wide = {key: tensor.double() for key, tensor in inputs.items()}
    expected = differentiate(partial(windowed_attention_reference, window=window), wide)
    run = lambda q, k, v: attention(q, k, v)  # noqa: E731
    error = largest_error(differentiate(run, inputs), expected)
    ms = milliseconds(lambda: differentiate(run, inputs))
    name = "Transformer Engine: windowed attention"
    return judge(KERNELS, name, error, torch.bfloat16, ms)
