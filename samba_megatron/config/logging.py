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
