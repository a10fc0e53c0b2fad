"""How long and how: batch sizes, ends, faults; and the validation inside the loop."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TrainingConfig:
    """The length of a run is given in tokens or in steps: exactly one of them."""

    train_tokens: int | None = None
    """Tokens of the whole run; the last step that is needed to reach it is run."""

    train_steps: int | None = None
    """Optimizer steps of the whole run."""

    micro_batch_size: int = 1
    """Sequences a forward pass and rank."""

    global_batch_size: int = 8
    """Sequences an optimizer step, over all data-parallel ranks."""

    rampup_start_batch_size: int | None = None
    """First global batch size of a batch-size ramp."""

    rampup_batch_size_increment: int | None = None
    """Sequences added at each stage of the ramp."""

    rampup_tokens: int | None = None
    """Tokens over which the ramp reaches ``global_batch_size``."""

    seed: int = 1234
    """Seed of initial weights and data order."""

    exit_duration_minutes: float | None = None
    """Save and exit with code 75 ("start me again") after this many minutes of training."""

    exit_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals on which the step in progress is finished, the state saved and code 75 returned."""

    exit_step: int | None = None
    """Save and exit with code 75 after this step: to try out resuming."""

    rerun_mode: Literal["disabled", "validate_results"] = "validate_results"
    """What happens on a non-finite loss or gradient: ``validate_results`` runs the step again to
    tell a broken device (code 77) from broken mathematics (code 76); ``disabled`` stops (76)."""

    gc_interval: int = 100
    """Collect Python garbage every so many steps, on all ranks at once; 0 leaves it to Python."""

    deterministic: bool = False
    """Bitwise repeatable kernels, where there is a choice; slower."""


@dataclass
class ValidationConfig:
    """Held-out loss and perplexity, at several context lengths."""

    eval_interval: int | None = None
    """Steps between validations; unset: only where ``eval_at_start`` and the end ask for it."""

    eval_at_start: bool = False
    """Validate before the first step of a new run."""

    eval_at_end: bool = True
    """Validate after the last step."""

    sequence_lengths: list[int] = field(default_factory=list)
    """Context lengths; the training sequence length when empty."""

    eval_tokens: int = 1_048_576
    """Held-out tokens a length and validation, at most."""
