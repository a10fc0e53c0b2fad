"""Steps whose projection is split and rotated in one, and by megatron in turn: the same."""

from typing import Any

import torch

from samba_megatron.config import ParallelConfig
from samba_megatron.ops.rotary.dispatch import ROTARY
from tests.model.documents_ranks import CP2, FULL, TP2_SP, layout
from tests.model.isolation import TORCH, Trace, Trial, toy_run
from tests.model.recomputing import PACKING

LAYOUTS: dict[str, ParallelConfig] = {
    "tp2 sp full": ParallelConfig(**TP2_SP, **FULL),
    "cp2": ParallelConfig(**CP2),
}
"""Of two or more processes; those left over do the same (``documents_ranks.py`` runs them)."""


def step(rotary: str, parallel: ParallelConfig, apart: bool, **model: Any) -> Trace:
    """A step from the seed; no convolution comes between the split and the rotation."""
    run = toy_run({**TORCH, "rotary": rotary}, parallel, short_convolution=False, **model)
    run.data.reset_at_document_boundaries = apart
    trial = Trial(run)
    start = PACKING.document_start() if apart else None
    return trial.step(trial.tokens, torch.ones(trial.tokens.shape), start)


def differences(parallel: ParallelConfig, apart: bool = True, **model: Any) -> dict[str, float]:
    """By tensor, the largest difference on this rank, as a part of its largest value.

    Args:
        parallel: the layout.
        apart: whether sequences hold several documents.
        model: fields that differ from the toy's.
    """
    with layout(parallel):
        theirs = step("megatron", parallel, apart, **model)
        ROTARY.last_backend = None
        ours = step("torch", parallel, apart, **model)
        assert ROTARY.last_backend == "torch", "it was not asked"
    pairs: dict[str, Any] = {
        f"output {number}": pair
        for number, pair in enumerate(zip(ours.outputs, theirs.outputs, strict=True))
    }
    pairs |= {f"tokens of {n}": (g, theirs.gradients[n]) for n, g in ours.gradients.items()}
    assert ours.parameters.keys() == theirs.parameters.keys()
    pairs |= {name: (g, theirs.parameters[name]) for name, g in ours.parameters.items()}
    return {
        name: float((one - other).abs().max() / other.abs().max())
        for name, (one, other) in pairs.items()
    }
