"""One layer of each kind as this project builds it, and as peers do: forward and backward.

Each with its norm and its residual, on one long document a sequence; the gradients of its weights
are made anew in each call.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from samba_megatron.benchmarks import peers
from samba_megatron.benchmarks.plan import Plan
from samba_megatron.benchmarks.timing import DTYPES, move, time_call
from samba_megatron.config import ParallelConfig, PrecisionConfig, RunConfig
from samba_megatron.model.layers import KINDS
from samba_megatron.ops.measuring import device
from samba_megatron.platform import distributed
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.trials import Trial

AREA = "layers"
_VOCABULARY = 256
"""Of the model that the layers are taken from, whose embedding is not measured."""


def trials(plan: Plan) -> Iterator[Trial]:
    """Every kind of layer in the recipe's pattern, this project's and the peers'."""
    for symbol in plan.symbols():
        name = KINDS[symbol].name
        yield AREA, f"{name}: samba_megatron", partial(measure, plan, symbol)
        for peer in peers.LAYERS.get(symbol, {}):
            yield AREA, f"{name}: {peer}", partial(measure_peer, plan, symbol, peer)


def measure(plan: Plan, symbol: str) -> Finding:
    """This project's layer, on the layer backend that training takes here."""
    model, implementation = _model(plan)
    layer = model.decoder.layers[plan.symbols().index(symbol)]
    options: dict[str, Any] = {"attention_mask": None}
    if symbol in "*F" and hasattr(model, "rotary_pos_emb"):
        options["rotary_pos_emb"] = model.rotary_pos_emb(plan.length)

    def run(x: Tensor) -> Tensor:
        y = layer(hidden_states=x, **options)
        return y[0] if isinstance(y, tuple) else y

    row = {"kernel": f"samba_megatron ({implementation})", "peer": False}
    x = _hidden(plan, plan.length, plan.batch)
    return _timed(plan, symbol, f"{KINDS[symbol].name}: samba_megatron", row, layer, run, x)


def measure_peer(plan: Plan, symbol: str, peer: str) -> Finding:
    """Another package's layer of the same sizes."""
    found, title = peers.LAYERS[symbol][peer], f"{KINDS[symbol].name}: {peer}"
    row = {"layer": KINDS[symbol].name, "kernel": peer, "peer": True}
    if reason := peers.unavailable(found.packages):
        return Finding(AREA, title, State.OFF, reason, figures=row)
    layer = found.build(plan.model(), DTYPES[plan.dtype])
    return _timed(plan, symbol, title, row, layer, layer, _hidden(plan, plan.batch, plan.length))


def _timed(
    plan: Plan,
    symbol: str,
    title: str,
    row: dict[str, Any],
    layer: nn.Module,
    run: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Finding:
    weights = torch.randn_like(x)

    def step() -> None:
        run(x).backward(weights)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    timing = time_call(step, plan.seconds)
    tokens = plan.shape.tokens
    flops = 3 * KINDS[symbol].flops_per_token(plan.model(), plan.length)
    row |= {
        "layer": KINDS[symbol].name,
        "shape": str(plan.shape),
        "dtype": plan.dtype,
        "tokens": tokens,
        "both_ms": timing.milliseconds(),
        "calls": timing.calls,
        "tokens_per_second": round(tokens / timing.median, 1),
        "flops_per_second": flops * tokens / timing.median,
        "parameters": sum(parameter.numel() for parameter in layer.parameters()),
    }
    found = f"{row['both_ms'][0]:.3g} ms, {row['tokens_per_second']:,.0f} tokens/s"
    return Finding(AREA, title, State.OK, found, figures=row)


def _hidden(plan: Plan, *shape: int) -> Tensor:
    size = (*shape, plan.model().hidden_size)
    return move(torch.randn(size, device=device(), dtype=DTYPES[plan.dtype]))


@cache
def _model(plan: Plan) -> tuple[Any, str]:
    """A model with one layer of each kind, and its layer backend."""
    from samba_megatron.model.backend import choose_implementation

    distributed.initialize(ParallelConfig())
    from megatron.core import tensor_parallel

    from samba_megatron.model.samba import build_model

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = one_of_each(plan)
    implementation = choose_implementation(
        config.kernels.transformer_impl, distributed.device_type()
    )
    return build_model(config, implementation)[0], implementation


def one_of_each(plan: Plan) -> RunConfig:
    """The recipe with one layer of each of its kinds, on one device, in the plan's dtype."""
    config = plan.config()
    sizes = dataclasses.replace(
        config.model, hybrid_layer_pattern=plan.symbols(), vocab_size=_VOCABULARY
    )
    return dataclasses.replace(
        config,
        model=sizes,
        parallel=ParallelConfig(),
        precision=PrecisionConfig(params_dtype=plan.dtype),  # type: ignore[arg-type]
        data=dataclasses.replace(config.data, sequence_length=plan.length),
    )
