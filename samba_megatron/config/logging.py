"""What a run says about itself, and where."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LoggingConfig:
    """``metrics.jsonl`` in the run folder is always written; the rest is for people."""

    log_interval: int = 1
    """Steps between lines (and live updates)."""

    straggler_interval: int | None = 10
    """Steps between comparisons of the ranks' computing times; unset: none."""

    log_layer_norms_interval: int | None = None
    """Steps between records of each layer's weight, gradient and activation norms; unset: none."""

    log_fp8_health_interval: int | None = None
    """Steps between records of what FP8 loses and clips of each matrix product; unset: none."""

    progress: Literal["auto", "live", "plain"] = "auto"
    """A live panel, or plain lines; ``auto`` is live on a terminal."""

    mlflow_tracking_uri: str | None = None
    """Send the metrics to MLflow as well: ``sqlite:////path/mlflow.db``, ``http://host:port``, …; a
    process of its own does it, so that a slow or dead service costs the training nothing."""

    mlflow_experiment: str = "samba"
    """MLflow's experiment; a run and all its resumes are one MLflow run in it."""

    profile_step_start: int | None = None
    """Profile from this step (its kernels and a trace go to the run folder's ``profile/``)."""

    profile_step_end: int | None = None
    """To before this step; one step when unset."""

    profile_ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that are profiled."""

    profile_shapes: bool = False
    """Also record the shapes operators are given and the modules they run in, for the table of who
    makes the copies. It costs host time, so look for idle times in a profile without."""
