"""What a run says about itself, and where."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class LoggingConfig:
    """``metrics.jsonl`` in the run folder is always written; the rest is for people."""

    log_interval: int = 1
    """Steps between lines (and live updates)."""

    progress: Literal["auto", "live", "plain"] = "auto"
    """A live panel, or plain lines; ``auto`` is live on a terminal."""

    mlflow_tracking_uri: str | None = None
    """Send the metrics to MLflow as well: ``sqlite:////path/mlflow.db``, ``http://host:port``, …; a
    process of its own does it, so that a slow or dead service costs the training nothing."""

    mlflow_experiment: str = "samba"
    """MLflow's experiment; a run and all its resumes are one MLflow run in it."""
