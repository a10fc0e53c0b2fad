"""The operations at a model's sizes, on every backend that this machine has and on peers' kernels.

Inputs have the strides that they have in the model. Backends named "reference" are left out: they
are what kernels are held against, written to be read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from samba_megatron.benchmarks import peers
from samba_megatron.benchmarks.plan import Plan, Shape
from samba_megatron.benchmarks.timing import DTYPES, Outputs, move, time_passes
from samba_megatron.config import ModelConfig
from samba_megatron.ops.backends import OPERATIONS
from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.cost import (
    Passes,
    attention_work,
    conv_work,
    linear_cross_entropy_work,
    rms_norm_work,
    rotary_work,
    scan_work,
    swiglu_work,
)
from samba_megatron.ops.linear_cross_entropy import linear_cross_entropy
from samba_megatron.ops.measuring import device
from samba_megatron.ops.registry import Request
from samba_megatron.ops.rms_norm import rms_norm
from samba_megatron.ops.rotary import split_and_rotate
from samba_megatron.ops.selective_scan import selective_scan
from samba_megatron.ops.selective_scan.benchmark import make_inputs as scan_inputs
from samba_megatron.ops.swiglu import swiglu
from samba_megatron.ops.windowed_attention import windowed_attention
from samba_megatron.ops.windowed_attention.packing import in_rows, pack_documents
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.trials import Trial

AREA = "kernels"
DOCUMENTS = ", documents apart"
"""Of a backend's name: told where documents begin, of which each sequence here is one."""

Inputs = dict[str, Any]
_LETTERS = {
    "selective_scan": "M",
    "causal_conv1d": "M",
    "windowed_attention": "*F",
    "swiglu": "-",
    "rotary": "*F",
}
"""The layers that an operation is of, where it is of some only."""


@dataclass(frozen=True)
class Subject:
    """An operation at a model's sizes."""

    inputs: Callable[[], Inputs]
    run: Callable[..., Outputs]
    """Takes the inputs and ``backend``."""
    work: Passes
    sizes: dict[str, int]
    """As :class:`Request` has them."""
    gradients_at_once: bool = False
    """The forward pass makes the gradients too: alone, it is timed where none are wanted."""


def subjects(model: ModelConfig, shape: Shape, dtype: str) -> dict[str, Subject]:
    """The operations that are measured, by name.

    Args:
        model: sizes.
        shape: of the batch.
        dtype: of the activations.
    """
    size = DTYPES[dtype].itemsize
    heads, groups, head_dim = model.num_attention_heads, model.kv_heads, model.head_dim
    window = model.window_size if "*" in model.hybrid_layer_pattern else None
    attention = attention_work(shape.batch, shape.length, heads, groups, head_dim, window, size)
    return {
        "selective_scan": Subject(
            partial(_scan_inputs, model, shape, dtype),
            lambda backend, **inputs: selective_scan(**inputs, backend=backend)[0],
            scan_work(shape.tokens, model.d_inner, model.d_state, size),
            {"d_state": model.d_state},
        ),
        "causal_conv1d": Subject(
            partial(_conv_inputs, model, shape, dtype),
            causal_conv1d,
            conv_work(shape.tokens, model.d_inner, model.d_conv, size),
            {"channels": model.d_inner, "width": model.d_conv},
        ),
        "windowed_attention": Subject(
            partial(_attention_inputs, model, shape, dtype),
            partial(_attend, window=window),
            attention,
            {"head_dim": head_dim},
        ),
        "swiglu": Subject(
            lambda: {"x": _random(dtype, shape.length, shape.batch, 2 * model.ffn_hidden_size)},
            swiglu,
            swiglu_work(shape.tokens, model.ffn_hidden_size, size),
            {},
        ),
        "rms_norm": Subject(
            partial(_norm_inputs, model, shape, dtype),
            lambda backend, x, weight: rms_norm(x, weight, model.layernorm_epsilon, backend)[0],
            rms_norm_work(shape.tokens, model.hidden_size, size),
            {"row": model.hidden_size},
        ),
        "rotary": Subject(
            partial(_rotary_inputs, model, shape, dtype),
            partial(split_and_rotate, heads=heads, groups=groups),
            rotary_work(shape.tokens, heads, groups, head_dim, size),
            {},
        ),
        "linear_cross_entropy": Subject(
            partial(_loss_inputs, model, shape, dtype),
            lambda backend, **inputs: linear_cross_entropy(**inputs, backend=backend)[0],
            linear_cross_entropy_work(shape.tokens, model.hidden_size, model.vocab_size, size),
            {},
            gradients_at_once=True,
        ),
    }


def trials(plan: Plan) -> Iterator[Trial]:
    """Every shape, operation of the recipe's layers and kernel; those that cannot run say why."""
    model, symbols = plan.model(), set(plan.symbols())
    for shape in plan.shapes():
        known = subjects(model, shape, plan.dtype)
        for name, operation in OPERATIONS.items():
            if not symbols & set(_LETTERS.get(name, symbols)):
                continue
            if name not in known:
                yield AREA, f"{name} at {shape}", partial(_not_measured, name, shape)
                continue
            for backend in operation.backends:
                if backend != "reference":
                    run = partial(measure, plan, shape, name, backend)
                    yield AREA, f"{name}: {backend} at {shape}", run
            if name == "windowed_attention":
                for backend in ("transformer_engine", "flash_attn"):
                    run = partial(measure, plan, shape, name, backend + DOCUMENTS)
                    yield AREA, f"{name}: {backend}{DOCUMENTS} at {shape}", run
            for peer in peers.KERNELS.get(name, {}):
                run = partial(measure_peer, plan, shape, name, peer)
                yield AREA, f"{name}: {peer} at {shape}", run


def _not_measured(name: str, shape: Shape) -> Finding:
    return Finding(AREA, f"{name} at {shape}", State.OFF, "no sizes are written down for it")


def measure(plan: Plan, shape: Shape, name: str, backend: str) -> Finding:
    """One of this project's backends; it is a peer where its kernel is another package's."""
    subject = subjects(plan.model(), shape, plan.dtype)[name]
    chosen, features, extra = backend.removesuffix(DOCUMENTS), frozenset[str](), {}
    peer = OPERATIONS[name].backends[chosen].package not in (None, "triton")
    row = {"operation": name, "kernel": backend, "peer": peer, "shape": str(shape)}
    title = f"{name}: {backend} at {shape}"
    if backend.endswith(DOCUMENTS):
        features = frozenset({"reset"})
    request = Request(device(), DTYPES[plan.dtype], features, subject.sizes)
    if reason := OPERATIONS[name].backends[chosen].cannot_serve(request):
        return Finding(AREA, title, State.OFF, reason, figures=row)
    if features:
        extra = _documents(shape)
    inputs = subject.inputs()
    return _timed(
        plan, title, row, subject, partial(subject.run, **inputs, **extra, backend=chosen), inputs
    )


def measure_peer(plan: Plan, shape: Shape, name: str, peer: str) -> Finding:
    """Another package's kernel, on the layout that it wants."""
    row = {"operation": name, "kernel": peer, "peer": True, "shape": str(shape)}
    title = f"{name}: {peer} at {shape}"
    found = peers.KERNELS[name][peer]
    if reason := peers.unavailable(found.packages):
        return Finding(AREA, title, State.OFF, reason, figures=row)
    model = plan.model()
    subject = subjects(model, shape, plan.dtype)[name]
    run, leaves = found.prepare(subject.inputs(), model)
    return _timed(plan, title, row, subject, run, leaves)


def _timed(
    plan: Plan,
    title: str,
    row: Inputs,
    subject: Subject,
    run: Callable[[], Outputs],
    leaves: Inputs,
) -> Finding:
    wanted = [tensor for tensor in leaves.values() if tensor.requires_grad]
    forward, both = time_passes(run, wanted, plan.seconds, not subject.gradients_at_once)
    tokens = Shape.parse(row["shape"]).tokens
    per_thousand = 1e9 / tokens
    row |= {
        "dtype": plan.dtype,
        "tokens": tokens,
        "forward_ms": forward.milliseconds(),
        "both_ms": both.milliseconds(),
        "forward_us_per_1000": round(forward.median * per_thousand, 3),
        "both_us_per_1000": round(both.median * per_thousand, 3),
        "calls": [forward.calls, both.calls],
        "forward_work": vars(subject.work.forward),
        "backward_work": vars(subject.work.backward),
    }
    found = f"{row['forward_us_per_1000']:g} and {row['both_us_per_1000']:g} µs per 1000 tokens"
    return Finding(AREA, title, State.OK, found, figures=row)


def _documents(shape: Shape) -> Inputs:
    """Of one document a sequence; packed beforehand, as in training."""
    reset = torch.zeros(shape.length, shape.batch, dtype=torch.bool)
    reset[0] = True
    return {"reset": reset.to(device()), "packed": pack_documents(reset).to(device())}


def _scan_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    sizes = f"{model.d_inner}x{shape.batch}x{shape.length}"
    return scan_inputs(sizes, model.d_state, DTYPES[dtype], device())


def _conv_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    """x is one half of what the mixer's first linear gives."""
    projected = _random(dtype, shape.length, shape.batch, 2 * model.d_inner).detach()
    return {
        "x": move(projected.chunk(2, -1)[0]),
        "weight": _random(dtype, model.d_inner, model.d_conv),
        "bias": _random(dtype, model.d_inner),
    }


def _attend(**call: Any) -> Tensor:
    """As the layers have it: what follows takes it in rows, however the kernel has laid it."""
    return in_rows(windowed_attention(**call))


def _attention_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    queries = (shape.length, shape.batch, model.num_attention_heads, model.head_dim)
    keys = (shape.length, shape.batch, model.kv_heads, model.head_dim)
    return {
        name: _random(dtype, *size) for name, size in {"q": queries, "k": keys, "v": keys}.items()
    }


def _norm_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    return {
        "x": _random(dtype, shape.length, shape.batch, model.hidden_size),
        "weight": _random(dtype, model.hidden_size),
    }


def _loss_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    """Logits are about 1."""
    weight = _random(dtype, model.vocab_size, model.hidden_size).detach()
    size = (shape.length, shape.batch)
    return {
        "hidden": _random(dtype, *size, model.hidden_size),
        "weight": move(weight / model.hidden_size**0.5),
        "target": torch.randint(0, model.vocab_size, size, device=device()),
    }


def _rotary_inputs(model: ModelConfig, shape: Shape, dtype: str) -> Inputs:
    """Angles as the model makes them."""
    groups, head_dim = model.kv_heads, model.head_dim
    width = (model.num_attention_heads // groups + 2) * head_dim
    powers = torch.arange(0, head_dim, 2, device=device()) / head_dim
    rates = float(model.rotary_base) ** -powers
    angles = torch.outer(torch.arange(shape.length, device=device()), rates).repeat(1, 2)
    return {
        "qkv": _random(dtype, shape.length, shape.batch, groups, width),
        "angles": angles[:, None, None],
    }


def _random(dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device(), dtype=DTYPES[dtype], requires_grad=True)
