"""What is to be measured: the sizes, on what kind of device, for how long."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from samba_megatron.config import ModelConfig, RunConfig
from samba_megatron.config.load import parse_run_config
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.platform.errors import UserError

PARTS = ("kernels", "layers", "step")


@dataclass(frozen=True)
class Shape:
    """A batch of sequences."""

    batch: int
    length: int

    @staticmethod
    def parse(text: str) -> "Shape":
        """``1x32768``.

        Raises:
            UserError: it is none.
        """
        batch, _, length = text.partition("x")
        if not (batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
            raise UserError(f"shape {text!r} is not batch x length, as 1x32768")
        return Shape(int(batch), int(length))

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.batch * self.length

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Plan:
    """One benchmark; every process of it has the same."""

    recipe: str = "samba_tiny"
    batch: int = 1
    length: int = 256
    also: tuple[str, ...] = ()
    """Further shapes for the kernels."""
    dtype: str = "fp32"
    seconds: float = 0.4
    """For which one figure is measured."""
    steps: int = 24
    """Of a whole training step's measurement, warm-up included."""

    @staticmethod
    def for_machine(on_gpu: bool, **given: object) -> "Plan":
        """The machine's defaults and what is given (None: it is not): sizes of a real run in bf16
        on a GPU, small ones in fp32 on a CPU.

        Raises:
            UserError: the recipe does not exist, or a shape is none.
        """
        sizes = Plan()
        if on_gpu:
            sizes = Plan("samba_1.3b", 8, 4096, ("1x32768",), "bf16")
        wanted: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
        plan = dataclasses.replace(sizes, **wanted)
        plan = dataclasses.replace(plan, also=tuple(plan.also))  # from JSON it is a list
        plan.config()
        plan.shapes()
        return plan

    @property
    def shape(self) -> Shape:
        """Of layers and steps, and the kernels' first."""
        return Shape(self.batch, self.length)

    def shapes(self) -> list[Shape]:
        """Of the kernels, each once."""
        return list(dict.fromkeys([self.shape, *map(Shape.parse, self.also)]))

    def config(self) -> RunConfig:
        """The recipe."""
        return parse_run_config(["--config", self.recipe])

    def model(self) -> ModelConfig:
        """Its sizes."""
        return self.config().model

    def symbols(self) -> str:
        """The letters of its layers, each once, in order."""
        return "".join(dict.fromkeys(layer_symbols(self.model().hybrid_layer_pattern)))
