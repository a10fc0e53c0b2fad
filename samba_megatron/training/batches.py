"""How many sequences each step takes, and how many steps a run has."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from samba_megatron.config import RunConfig


@dataclass(frozen=True)
class BatchSchedule:
    """Global batch sizes over a run: constant, or ramped up by tokens.

    A ramp goes from ``start`` to ``full`` in equal stages of ``increment`` sequences, each lasting
    the same number of tokens; the size depends on the samples consumed only, so a resumed run
    continues it.
    """

    full: int
    sequence_length: int
    start: int | None = None
    increment: int = 0
    ramp_tokens: int = 0

    @staticmethod
    def from_config(config: RunConfig) -> "BatchSchedule":
        """The schedule of a checked configuration."""
        training = config.training
        return BatchSchedule(
            full=training.global_batch_size,
            sequence_length=config.data.sequence_length,
            start=training.rampup_start_batch_size,
            increment=training.rampup_batch_size_increment or 0,
            ramp_tokens=training.rampup_tokens or 0,
        )

    def global_batch_size(self, consumed_samples: int) -> int:
        """Sequences of the next step after ``consumed_samples``."""
        if self.start is None or self.start >= self.full:
            return self.full
        stages = (self.full - self.start) // self.increment
        tokens_a_stage = self.ramp_tokens / max(stages, 1)
        stage = int(consumed_samples * self.sequence_length / max(tokens_a_stage, 1))
        return min(self.start + stage * self.increment, self.full)

    def consumed_after_each_step(self) -> Iterator[int]:
        """Samples consumed after step 1, 2, …"""
        consumed = 0
        while True:
            consumed += self.global_batch_size(consumed)
            yield consumed


@dataclass(frozen=True)
class RunLength:
    """The end of a run, in steps and in what they consume."""

    steps: int
    samples: int
    tokens: int


def run_length(config: RunConfig) -> RunLength:
    """Length of the run from ``train_steps`` or ``train_tokens`` (whichever is given)."""
    schedule, length = BatchSchedule.from_config(config), config.data.sequence_length
    training = config.training
    if schedule.start is None:
        steps = training.train_steps
        if steps is None:
            steps = -(-(training.train_tokens or 0) // (length * schedule.full))
        samples = steps * schedule.full
        return RunLength(steps, samples, samples * length)
    if training.train_steps is not None:
        samples = max(islice(schedule.consumed_after_each_step(), training.train_steps))
        return RunLength(training.train_steps, samples, samples * length)
    for step, samples in enumerate(schedule.consumed_after_each_step(), 1):
        if samples * length >= (training.train_tokens or 0):
            return RunLength(step, samples, samples * length)
    raise AssertionError("unreachable: the schedule is endless")
