"""Steps with and without recomputed results: not a bit of them may differ."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from samba_megatron.config import ParallelConfig
from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from tests.model.documents_ranks import CP2, TP2_SP, VPP2, layout
from tests.model.isolation import LENGTH, TORCH, Packing, Trace, Trial, toy_run

LAYOUTS: dict[str, ParallelConfig] = {
    "tp2 sp": ParallelConfig(**TP2_SP),
    "pp2 vpp2": ParallelConfig(**VPP2),
    "cp2": ParallelConfig(**CP2),
}
"""Of two or more processes; those left over do the same (``documents_ranks.py`` runs them)."""
ALL = list(RECOMPUTABLE_PARTS)
TOGETHER = [ALL, ["mamba", "mlp", "layernorm"]]
"""What is recomputed, in turn."""
PACKING = Packing(((20,), (), (1, 70, LENGTH // 2), (LENGTH - 1,)), sequence=0, position=0)


def recomputing(parallel: ParallelConfig, names: list[str]) -> ParallelConfig:
    """The layout with these names recomputed."""
    fields: Any = {"recompute_granularity": "selective", "recompute_modules": names}
    return replace(parallel, **fields)


def step(parallel: ParallelConfig, apart: bool) -> Trace:
    """A step from the seed."""
    run = toy_run(TORCH, parallel)
    run.data.reset_at_document_boundaries = apart
    trial = Trial(run)
    start = PACKING.document_start() if apart else None
    return trial.step(trial.tokens, torch.ones(trial.tokens.shape), start)


def differences(
    parallel: ParallelConfig, lists: Sequence[list[str]], apart: bool = True
) -> list[str]:
    """What differs on this rank from a step without recomputation.

    Args:
        parallel: the layout.
        lists: what is recomputed, in turn.
        apart: whether sequences hold several documents.
    """
    with layout(parallel):
        plain = step(parallel, apart)
        return [
            f"{names}: {what}"
            for names in lists
            for what in _differing(step(recomputing(parallel, names), apart), plain)
        ]


def _differing(one: Trace, other: Trace) -> list[str]:
    assert one.parameters.keys() == other.parameters.keys()
    assert one.gradients.keys() == other.gradients.keys()
    tensors = {
        "outputs": (one.outputs, other.outputs),
        "gradients of the tokens": (one.gradients.values(), other.gradients.values()),
        **{f"gradient of {n}": ([g], [other.parameters[n]]) for n, g in one.parameters.items()},
    }
    return [
        what
        for what, (mine, theirs) in tensors.items()
        if not all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    ]
