"""Tries every kernel that can run on this machine, once, against the reference in fp64.

python -m samba_megatron.ops.trials DONE

is the child of :func:`samba_megatron.platform.trials.run_in_children`. The reference gets the same
rounded inputs. An error is the largest deviation of the output or of any gradient, as a part of its
largest value.
"""

import inspect
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops import library_trials
from samba_megatron.ops.backends import OPERATIONS
from samba_megatron.ops.causal_conv1d.dispatch import causal_conv1d
from samba_megatron.ops.linear_cross_entropy.dispatch import linear_cross_entropy
from samba_megatron.ops.measuring import (
    Function,
    Inputs,
    activation,
    device,
    differentiate,
    judge,
    largest_error,
    milliseconds,
    normal,
    on_gpu,
)
from samba_megatron.ops.rms_norm import rms_norm
from samba_megatron.ops.rotary import split_and_rotate
from samba_megatron.ops.selective_scan import selective_scan
from samba_megatron.ops.swiglu.dispatch import swiglu
from samba_megatron.ops.windowed_attention.dispatch import windowed_attention
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.trials import Trial, serve

AREA = "kernels"

_REMEDY = {
    "fused": "make setup",
    "mamba_ssm": "make setup-gpu",
    "causal_conv1d": "make setup-gpu",
    "flash_attn": "make setup-gpu",
}


def main() -> None:
    """Runs all trials but the first so many."""
    serve([*library_trials.before(), *kernel_trials(), *library_trials.after()], int(sys.argv[1]))


def kernel_trials() -> Iterator[Trial]:
    """Every backend of every operation."""
    calls: dict[str, tuple[Function, Callable[[], Inputs]]] = {
        "selective_scan": (_scan, scan_inputs),
        "causal_conv1d": (causal_conv1d, conv_inputs),
        "windowed_attention": (_attention, attention_inputs),
        "swiglu": (swiglu, swiglu_inputs),
        "rms_norm": (_norm, norm_inputs),
        "rotary": (_rotary, rotary_inputs),
        "linear_cross_entropy": (_loss, loss_inputs),
    }
    for name, (function, inputs) in calls.items():
        for backend in OPERATIONS[name].backends:
            trial = partial(try_backend, name, backend, function, inputs)
            yield AREA, f"{name}: {backend}", trial


def try_backend(
    operation: str, backend: str, function: Function, make_inputs: Callable[[], Inputs]
) -> Finding:
    """Compares one backend with the reference, and takes its time.

    Args:
        operation: its name in :data:`~samba_megatron.ops.backends.OPERATIONS`.
        backend: the name to force.
        function: the operation's entrance; takes the inputs and ``backend``.
        make_inputs: gives the same inputs each time.
    """
    name = f"{operation}: {backend}"
    if reason := OPERATIONS[operation].backends[backend].unavailable():
        return _unavailable(operation, backend, name, reason)
    inputs, errors, served = make_inputs(), [], []
    for words, options in _variants(function, next(iter(inputs.values()))):
        call = partial(function, backend=backend, **options)
        try:
            actual = differentiate(call, inputs)
        except UserError:
            continue  # it does not take such calls, and the dispatch knows
        errors.append(largest_error(actual, _expected(operation, function, options, inputs)))
        served.append((words, call))
    if not served:
        return Finding(AREA, name, State.OFF, "it takes no call of this kind")
    dtype = next(iter(inputs.values())).dtype
    ms = milliseconds(lambda: differentiate(served[0][1], inputs))
    meaning = " and ".join(words for words, _ in served)
    worst = max(errors, key=lambda error: math.inf if math.isnan(error) else error)
    return judge(AREA, name, worst, dtype, ms, meaning=meaning)


def _expected(
    operation: str, function: Function, options: dict[str, Any], inputs: Inputs
) -> dict[str, Tensor]:
    reference = list(OPERATIONS[operation].backends)[-1]  # fastest first, plainest last
    wide = {key: tensor.double() for key, tensor in inputs.items()}
    return differentiate(partial(function, backend=reference, **options), wide)


def _variants(function: Function, first: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to call it for and with: whole sequences, and three documents in each."""
    yield "whole sequences", {}
    if "reset" in inspect.signature(function).parameters:
        reset = torch.zeros(first.shape[:2], dtype=torch.bool, device=first.device)
        reset[[0, first.shape[0] // 3, first.shape[0] // 2]] = True
        yield "inside documents", {"reset": reset}


def _unavailable(operation: str, backend: str, name: str, reason: str) -> Finding:
    """Its lack costs something where it would be chosen on a GPU, and nothing elsewhere."""
    if reason == "there is no CUDA device":
        return Finding(AREA, name, State.OFF, "needs a GPU")
    available = [b.name for b in OPERATIONS[operation].backends.values() if not b.unavailable()]
    order = list(OPERATIONS[operation].backends)
    instead = available[0] if available else "nothing"
    meaning = f"{instead} is used"
    if available and order.index(instead) < order.index(backend):
        return Finding(AREA, name, State.OFF, reason, meaning)
    fix = _REMEDY.get(backend, "make setup")
    return Finding(AREA, name, State.POOR, reason, f"{meaning} instead, more slowly", fix)


def scan_inputs() -> Inputs:
    """[L, b, E] = [1024, 2, 512] on a GPU, [64, 2, 32] on a CPU; N = 16."""
    length, batch, channels, states = (1024, 2, 512, 16) if on_gpu() else (64, 2, 32, 16)
    rates = torch.arange(1, states + 1, device=device()).float().expand(channels, -1)
    return {
        "u": activation(1, length, batch, channels),
        "delta": activation(2, length, batch, channels),
        "A": -rates.contiguous(),
        "B": activation(3, length, batch, states),
        "C": activation(4, length, batch, states),
        "D": normal(5, channels).float(),
        "z": activation(6, length, batch, channels),
        "delta_bias": normal(8, channels).float() - 3,
    }


def conv_inputs() -> Inputs:
    """[L, b, E] = [1024, 2, 512] on a GPU, [64, 2, 32] on a CPU; 4 positions wide."""
    length, channels = (1024, 512) if on_gpu() else (64, 32)
    return {
        "x": activation(1, length, 2, channels),
        "weight": activation(2, channels, 4),
        "bias": activation(3, channels),
    }


def attention_inputs() -> Inputs:
    """4 heads of 128 over 2 of keys, window 256 of 1024, on a GPU; 4 of 16, 32 of 128 on a CPU."""
    length, head_dim = (1024, 128) if on_gpu() else (128, 16)
    return {
        "q": activation(1, length, 2, 4, head_dim),
        "k": activation(2, length, 2, 2, head_dim),
        "v": activation(3, length, 2, 2, head_dim),
    }


def norm_inputs() -> Inputs:
    """[s, b, d] = [1024, 2, 1024] on a GPU, [64, 2, 64] on a CPU."""
    length, width = (1024, 1024) if on_gpu() else (64, 64)
    return {"x": activation(1, length, 2, width), "weight": activation(2, width)}


def rotary_inputs() -> Inputs:
    """4 heads of 128 over 2 of keys, 1024 positions, on a GPU; 4 of 16, 64 positions, on a CPU."""
    length, head_dim = (1024, 128) if on_gpu() else (64, 16)
    return {"qkv": activation(1, length, 2, 2, 4 * head_dim)}


def swiglu_inputs() -> Inputs:
    """[s, b, 2F] = [1024, 2, 2048] on a GPU, [64, 2, 64] on a CPU."""
    shape = (1024, 2, 2048) if on_gpu() else (64, 2, 64)
    return {"x": activation(1, *shape)}


def loss_inputs() -> Inputs:
    """[s, b, d] = [1024, 2, 1024] and a vocabulary of 32000 on a GPU, [64, 2, 16] and 200 on a CPU;
    logits are about 1."""
    length, width, vocabulary = (1024, 1024, 32000) if on_gpu() else (64, 16, 200)
    weight = activation(2, vocabulary, width) / math.sqrt(width)
    return {"hidden": activation(1, length, 2, width), "weight": weight}


def _loss(hidden: Tensor, weight: Tensor, backend: str) -> Tensor:
    positions = torch.arange(hidden[..., 0].numel(), device=hidden.device)
    target = (positions * 7919 % weight.shape[0]).view(hidden.shape[:-1])
    return linear_cross_entropy(hidden, weight, target, backend=backend)[0]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, backend: str, reset: Tensor | None = None
) -> Tensor:
    return windowed_attention(q, k, v, window=q.shape[0] // 4, reset=reset, backend=backend)


def _norm(x: Tensor, weight: Tensor, backend: str) -> Tensor:
    normalised, residual = rms_norm(x, weight, 1e-5, backend)
    return normalised + residual


def _rotary(qkv: Tensor, backend: str) -> Tensor:
    """At positions up to a million."""
    length, head_dim = qkv.shape[0], qkv.shape[-1] // 4
    positions = torch.arange(10**6 - length, 10**6, device=qkv.device)
    rates = 1e4 ** -torch.linspace(0, 1, head_dim // 2, device=qkv.device)
    angles = torch.outer(positions, rates).repeat(1, 2)[:, None, None]
    q, k, v = split_and_rotate(qkv, angles, 4, 2, backend)
    return torch.cat([q, k, v], dim=2)


def _scan(backend: str, reset: Tensor | None = None, **inputs: Any) -> Tensor:
    return selective_scan(**inputs, reset=reset, backend=backend)[0]


if __name__ == "__main__":
    main()
