"""What a run does about faults: hangs, loss spikes, numbers that are not finite."""

from dataclasses import dataclass


@dataclass
class FaultsConfig:
    """The watchdog is on always; skipping of batches changes the run and is off unless wanted."""

    watchdog: bool = True
    """End with code 78 and a report of the culprit where a step, save or validation hangs."""

    hang_timeout_minutes: float | None = None
    """A step, save or validation that lasts longer hangs (the first step: five times as long);
    unset: learned from the run, for steps ten times the median, at least 5 minutes."""

    skip_spikes: bool = False
    """Take no optimizer step where the loss or the gradient norm is an outlier or not finite."""

    spike_window: int = 128
    """Steps before that say what is usual; until half of them are done, only what is not finite is
    skipped."""

    spike_zscore: float = 8.0
    """An outlier is this many robust standard deviations (1.4826 × median absolute deviation)
    above the median of the window."""

    max_skips_in_row: int = 4
    """After so many skipped steps in a row go back to an older checkpoint, past the data since."""

    max_skipped_steps: int = 100
    """Skipped steps of the whole run, after which it ends with code 76."""

    max_rollbacks: int = 3
    """Returns to an older checkpoint in the whole run, after which it ends with code 76."""
