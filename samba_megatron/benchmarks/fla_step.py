"""Whole optimizer steps of flash-linear-attention's Samba of the same sizes, as its users train it.

AdamW is torch's fused one. ``bf16 autocast`` keeps the weights in fp32; ``bf16 weights`` has
everything in bf16, the optimizer's moments too. Where memory does not suffice, the micro-batch is
halved, and the row says so.
"""

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from samba_megatron.benchmarks import peers
from samba_megatron.benchmarks.plan import Plan
from samba_megatron.benchmarks.timing import Timing, is_out_of_memory, release_memory
from samba_megatron.checkpoint.huggingface.fields import beyond_fla, to_fields
from samba_megatron.config import ModelConfig
from samba_megatron.model.samba import count_parameters, flops_per_token
from samba_megatron.ops.measuring import device, synchronize
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.hardware import peak_memory_gib, reserved_memory_gib
from samba_megatron.platform.trials import Trial

AREA = "step"
WAYS = ("bf16 autocast", "bf16 weights")
NEEDED = tuple(dict.fromkeys([*peers.FLA_MAMBA, *peers.FLA_ATTENTION]))
_WARM_UP = 5


def trials(plan: Plan) -> Iterator[Trial]:
    """One in each way."""
    for way in WAYS:
        yield AREA, f"fla, {way}", partial(measure, plan, way)


def measure(plan: Plan, way: str) -> Finding:
    """Steps at the plan's shape, or at the largest part of the batch that fits."""
    title, row = f"fla, {way}", {"kernel": f"fla, {way}", "peer": True}
    model = plan.model()
    reason = peers.unavailable(NEEDED)
    if beyond := beyond_fla(model):
        reason = f"fla's Samba cannot express this model ({', '.join(beyond)})"
    if reason:
        return Finding(AREA, title, State.OFF, reason, figures=row)
    batch = plan.batch
    while True:
        try:
            row |= train(build(model, plan.length, way), plan, way, batch)
            break
        except RuntimeError as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        release_memory()
        batch //= 2
    found = f"{row['tokens_per_second']:,.0f} tokens/s, {row['memory_gib']:.1f} GiB"
    if batch < plan.batch:
        found += f", at a micro-batch of {batch}: memory did not suffice for {plan.batch}"
    return Finding(AREA, title, State.OK, found, figures=row)


def fla_fields(model: ModelConfig, length: int) -> dict[str, Any]:
    """The arguments of fla's SambaConfig for a model of these sizes."""
    fields = to_fields(model, length, {})
    return {
        name: value
        for name, value in fields.items()
        if name not in ("model_type", "architectures", "auto_map")
    }


def build(model: ModelConfig, length: int, way: str) -> nn.Module:
    """The model with fla's initial weights, ready to train."""
    from fla.layers import mamba
    from fla.models import SambaConfig, SambaForCausalLM

    peers.require_fast_path(mamba)
    with torch.device(device()):
        made = SambaForCausalLM(SambaConfig(**fla_fields(model, length)))
    found = sum(parameter.numel() for parameter in made.parameters())
    if found != count_parameters(model):
        raise ValueError(f"fla's model has {found:,} parameters, not {count_parameters(model):,}")
    made = made.to(device())
    return made.to(torch.bfloat16) if way == "bf16 weights" else made


def train(model: nn.Module, plan: Plan, way: str, batch: int) -> dict[str, Any]:
    """Trains on random tokens: the median step after a warm-up, and the largest memory.

    Args:
        model: gives an output with a ``loss`` for ``input_ids`` and ``labels``.
        plan: says length and steps.
        way: one of :data:`WAYS`.
        batch: sequences of a step.
    """
    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sizes = plan.model()
    autocast = torch.autocast(device(), torch.bfloat16, enabled=way == "bf16 autocast")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    model.train()
    tokens = torch.randint(0, sizes.vocab_size, (batch, plan.length), device=device())
    seconds, losses = [], []
    for _ in range(plan.steps):
        synchronize()
        start = time.perf_counter()
        with autocast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss.detach()))
    if not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"a loss is not finite: {losses}")
    taken = Timing.of(seconds[min(_WARM_UP, plan.steps - 1) :])
    count = batch * plan.length
    return {
        "micro_batch_size": batch,
        "sequence_length": plan.length,
        "tokens_per_second": round(count / taken.median, 1),
        "tokens_per_second_range": [round(count / t, 1) for t in (taken.high, taken.low)],
        "steps": taken.calls,
        "flops_per_second": flops_per_token(sizes, plan.length).model * count / taken.median,
        "memory_gib": round(peak_memory_gib(), 2),
        "memory_reserved_gib": round(reserved_memory_gib(), 2),
        "losses": [round(loss, 4) for loss in losses],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
