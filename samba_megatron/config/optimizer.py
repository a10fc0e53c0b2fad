"""AdamW and the learning-rate schedule."""

from dataclasses import dataclass, field
from typing import Literal

DecayExemption = Literal["norm", "bias", "A_log", "D", "conv1d", "embedding"]


@dataclass
class OptimizerConfig:
    """AdamW with the states sharded over data-parallel ranks (distributed optimizer, always)."""

    adam_impl: Literal["auto", "transformer_engine", "apex", "torch"] = "auto"
    """Whose AdamW; ``auto`` takes the first of this list that is installed and can run."""

    lr: float = 4e-4
    """Peak learning rate."""

    min_lr: float = 4e-5
    """Learning rate at the end of the decay."""

    weight_decay: float = 0.1
    """Decoupled weight decay."""

    weight_decay_exempt: list[DecayExemption] = field(
        default_factory=lambda: ["norm", "bias", "A_log", "D", "conv1d"]
    )
    """Parameters without weight decay, by kind. The Samba authors decay everything: ``[]``."""

    adam_beta1: float = 0.9
    """Decay of the first moment."""

    adam_beta2: float = 0.95
    """Decay of the second moment."""

    adam_eps: float = 1e-8
    """Term added to the denominator."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 does not clip."""


@dataclass
class ScheduleConfig:
    """Warm-up, then decay over the whole run, both measured in tokens.

    Give the warm-up as tokens, steps or a fraction of the run: exactly one counts (tokens before
    steps before fraction).
    """

    lr_decay_style: Literal["cosine", "linear", "WSD", "constant"] = "cosine"
    """Shape of the decay from ``lr`` to ``min_lr``; WSD is warm-up, stable, decay."""

    lr_warmup_fraction: float = 0.01
    """Linear warm-up as a part of the run's tokens."""

    lr_warmup_tokens: int | None = None
    """Linear warm-up in tokens."""

    lr_warmup_steps: int | None = None
    """Linear warm-up in steps."""

    lr_decay_tokens: int | None = None
    """Tokens at which the decay has reached ``min_lr``; the run's tokens when unset."""

    lr_wsd_decay_fraction: float = 0.1
    """WSD: the last part of ``lr_decay_tokens``, in which the rate falls."""

    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """WSD: how it falls."""
