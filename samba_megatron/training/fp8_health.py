"""What FP8 makes of each matrix product's operands, on chosen steps: what it loses, what it clips.

A product whose numbers do not fit its format trains on quietly, with gradients that are zero where
they should be small. So the operands are looked at in high precision just before Transformer Engine
casts them, with the scales that it will use: delayed scaling's own, or those that the recipe makes
of the tensor at hand. Counts are summed over all ranks; without an interval nothing is done.
A weight that is kept in FP8 (``precision.fp8_param_gather``) has been cast before, where nothing
looked on: of it the largest number is noted, and no losses.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samba_megatron.config import PrecisionConfig
from samba_megatron.model.fp8_weights import is_quantized, plain
from samba_megatron.ops.fp8_format import E4M3, E5M2, Scaling, lost_and_clipped, own_scale
from samba_megatron.platform import distributed
from samba_megatron.training.layer_names import bare, layer_place, layer_title

OPERANDS = ("input", "weight", "gradient")
"""Of a product: what comes in, the weight, and the gradient of what goes out."""
_INPUT, _WEIGHT, _GRADIENT = range(3)
_LINEARS_A_LAYER = 2
_ROWS_AT_ONCE = 4096
"""A multiple of every block's rows."""

_ROW_SCALING: dict[str, Scaling] = {"blockwise": "block_128", "mxfp8": "block_32"}
_WEIGHT_SCALING: dict[str, Scaling] = {"blockwise": "square_128", "mxfp8": "block_32"}


@dataclass(frozen=True)
class _Linear:
    """A linear whose product is in FP8, and its rows in the table."""

    module: Any
    row: int
    name: str


class Fp8Health:
    """Looks at the operands of every FP8 product of some steps.

    Args:
        chunks: this rank's model chunks.
        precision: the run's formats and how scales are found.
        interval: steps between records; None for none.
    """

    def __init__(
        self, chunks: Sequence[Any], precision: PrecisionConfig, interval: int | None
    ) -> None:
        self._chunks, self._precision = chunks, precision
        self._interval = interval if precision.fp8 is not None else None
        self._symbols = bare(chunks[0]).layer_symbols
        self._largest = self._counts = torch.zeros(0)
        self._linears: list[_Linear] = []

    def wanted(self, step: int) -> bool:
        """Whether the record of ``step`` is asked for."""
        return self._interval is not None and step % self._interval == 0

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Inside, operands are looked at, where the step is a wanted one."""
        if not self.wanted(step):
            yield
            return
        shape = (len(self._symbols) * _LINEARS_A_LAYER, len(OPERANDS))
        self._largest = torch.zeros(shape, device=distributed.device())
        self._counts = torch.zeros(*shape, 3, dtype=torch.float64, device=distributed.device())
        self._linears = [each for chunk in self._chunks for each in _fp8_linears(bare(chunk))]
        hooks = [hook for linear in self._linears for hook in self._attach(linear)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _attach(self, linear: _Linear) -> list[Any]:
        to_come_again, weight_seen = 0, False

        def before(module: Any, inputs: tuple[Tensor, ...]) -> None:
            nonlocal to_come_again, weight_seen
            # What is computed again was cast with the scales of its first pass, which has no
            # gradients.
            again = to_come_again > 0 and torch.is_grad_enabled()
            to_come_again += -1 if again else int(not torch.is_grad_enabled())
            if not again:
                self._look(linear, _INPUT, _normed(module, inputs[0].detach()))
            if not weight_seen:  # the same in every micro-batch
                weight_seen = True
                self._look(linear, _WEIGHT, module.weight.detach())

        def after(module: Any, inputs: Any, output: Any) -> None:
            product = output[0] if isinstance(output, tuple) else output
            if product.requires_grad:
                product.register_hook(lambda grad: self._look(linear, _GRADIENT, grad.detach()))

        module = linear.module
        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    @torch.no_grad()
    def _look(self, linear: _Linear, operand: int, tensor: Tensor) -> None:
        x = plain(tensor).reshape(-1, tensor.shape[-1])
        hybrid = self._precision.fp8 == "hybrid"
        number_format = E5M2 if hybrid and operand == _GRADIENT else E4M3
        scale = _delayed_scale(linear.module, operand, self._precision.fp8_recipe)
        scalings = _WEIGHT_SCALING if operand == _WEIGHT else _ROW_SCALING
        scaling = scalings.get(self._precision.fp8_recipe, "tensor")
        if scale is None and scaling == "tensor":
            scale = own_scale(x, number_format, scaling)
        largest = self._largest[linear.row, operand]
        amax = torch.linalg.vector_norm(x, torch.inf).float()
        torch.maximum(largest, amax, out=largest)
        if is_quantized(tensor):
            return
        for part in x.split(_ROWS_AT_ONCE):  # an operand in fp32, whole, may be gigabytes
            own = own_scale(part, number_format, scaling) if scale is None else scale
            self._counts[linear.row, operand] += lost_and_clipped(part, own, number_format)

    def collect(self) -> dict[str, Any]:
        """The record; every rank calls it after the backward pass.

        ``names`` of the linears (``layer 3 (attention) linear_qkv``) and, by name, for each of
        :data:`OPERANDS`: ``amax``, and of the numbers that are not zero the shares that became zero
        (``lost``) and that were clipped (``clipped``).
        """
        own = {each.row: each.name for each in self._linears}
        names: dict[int, str] = {}
        for text in distributed.gather_text(json.dumps(own)):
            names |= {int(row): name for row, name in json.loads(text).items()}
        torch.distributed.all_reduce(self._largest, op=torch.distributed.ReduceOp.MAX)
        torch.distributed.all_reduce(self._counts)
        rows = sorted(names)
        amax, counts = self._largest[rows].tolist(), self._counts[rows]
        shares = (counts[..., 1:] / counts[..., :1].clamp(min=1)).tolist()
        record: dict[str, Any] = {"names": [self._title(row, names[row]) for row in rows]}
        for place, operand in enumerate(OPERANDS):
            record[operand] = {
                "amax": [_short(each[place]) for each in amax],
                "lost": [_short(each[place][0]) for each in shares],
                "clipped": [_short(each[place][1]) for each in shares],
            }
        return record

    def _title(self, row: int, name: str) -> str:
        return f"{layer_title(row // _LINEARS_A_LAYER + 1, self._symbols)} {name}"


def worst(record: dict[str, Any]) -> str:
    """One line of a record, for people: where most is lost, and where most is clipped."""
    return "FP8: " + ", ".join(_worst_of(record, share) for share in ("lost", "clipped"))


def _worst_of(record: dict[str, Any], share: str) -> str:
    most, operand, name = max(
        (value, operand, name)
        for operand in OPERANDS
        for value, name in zip(record[operand][share], record["names"], strict=True)
    )
    verb = "lost to zero" if share == "lost" else share
    return f"at most {most:.2%} {verb}" + (f" ({operand} of {name})" if most else "")


def _fp8_linears(chunk: Any) -> Iterator[_Linear]:
    """Transformer Engine's linears of a chunk; of a layer, the first and the second."""
    places: dict[int, int] = {}
    for name, module in chunk.named_modules():
        if not name.startswith("decoder.layers.") or not _is_fp8(module):
            continue
        layer, inner = layer_place(chunk, name)
        place = places[layer] = places.get(layer, -1) + 1
        row = (layer - 1) * _LINEARS_A_LAYER + place
        yield _Linear(module, row, inner.rpartition(".")[2])


def _is_fp8(module: Any) -> bool:
    return hasattr(module, "fp8_meta") and hasattr(module, "weight")


def _normed(module: Any, x: Tensor) -> Tensor:
    """What the product takes in: ``x``, or what the norm inside the linear makes of it."""
    weight = getattr(module, "layer_norm_weight", None)
    if weight is None:
        return x
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight.detach(), module.eps)


def _delayed_scale(module: Any, operand: int, recipe: str) -> Tensor | None:
    """The scale that delayed scaling has ready for an operand; None under any other recipe."""
    if recipe != "delayed":
        return None
    forward = operand != _GRADIENT
    state = module.fp8_meta.get("scaling_fwd" if forward else "scaling_bwd")
    if state is None:  # before the first pass there is none: everything is cast as it is
        return torch.ones((), device=module.weight.device)
    scale: Tensor = state.scale[operand if forward else 0]
    return scale


def _short(value: float) -> float:
    return float(f"{value:.4g}")
