"""What the rules are applied to: the configuration, and the machine that it shall run on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from samba_megatron.config.pattern import layer_symbols
from samba_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Situation:
    """A configuration on a machine. The derived numbers hold once ``rules/numbers.py`` passed."""

    config: RunConfig
    world_size: int
    device_type: Literal["cuda", "cpu"]
    available_devices: int | None
    local_world_size: int | None

    @cached_property
    def layers(self) -> str:
        """The layers' symbols in order, without pipeline cuts."""
        return layer_symbols(self.config.model.hybrid_layer_pattern)

    @property
    def has_attention(self) -> bool:
        """Whether any layer is attention, with or without a window."""
        return "*" in self.layers or "F" in self.layers

    @property
    def replica_size(self) -> int:
        """Ranks that work on one sequence together."""
        parallel = self.config.parallel
        return (
            parallel.tensor_model_parallel_size
            * parallel.pipeline_model_parallel_size
            * parallel.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """Groups of those, each with its own sequences; right where the layout fits the world."""
        return max(1, self.world_size // self.replica_size)

    @property
    def concurrent_sequences(self) -> int:
        """Sequences that one micro-batch on every data-parallel rank takes together."""
        return self.config.training.micro_batch_size * self.data_parallel_size

    @property
    def evaluated_lengths(self) -> list[int]:
        """Context lengths of validation."""
        return self.config.validation.sequence_lengths or [self.config.data.sequence_length]

    @property
    def first_step_tokens(self) -> int:
        """Tokens of the first step."""
        training = self.config.training
        batch = training.rampup_start_batch_size or training.global_batch_size
        return batch * self.config.data.sequence_length

    @property
    def run_tokens(self) -> int | None:
        """Tokens of the whole run (with a batch-size ramp, a lower bound); unset: not given."""
        training = self.config.training
        if training.train_tokens is not None:
            return training.train_tokens
        if training.train_steps is not None:
            return training.train_steps * self.first_step_tokens
        return None


Rule = Callable[[Situation], Iterable[str]]
"""Yields a sentence for each violation."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def nearest_multiples(value: int, step: int) -> str:
    """The positive multiples of ``step`` around ``value``, in words: ``96 or 128``."""
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def nearest(value: int, legal: Iterable[int], most: int = 8) -> str:
    """The legal values in words: all when they are few, else the nearest on each side."""
    values = sorted(legal)
    if len(values) > most:
        below = [v for v in values if v <= value]
        above = [v for v in values if v > value]
        values = below[-2:] + above[:2]
    return ", ".join(map(str, values))


def not_multiple(name: str, value: int, step: int, because: str) -> Iterator[str]:
    """A sentence if ``value`` is not a multiple of ``step``."""
    if value % step:
        multiples = nearest_multiples(value, step)
        yield f"{name} {value} is not a multiple of {because}: use {multiples}"
