"""Which tensor of a checkpoint becomes which of a Hugging Face model, summed over the layers.

A Hugging Face block is a mixer and an MLP, megatron's layer one of them. In a pattern in which
they do not take turns, a mixer opens a block, and an MLP the block of the mixer before it closes;
an MLP without one has a block to itself. Each layer kind names its own tensors.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samba_megatron.config import ModelConfig
from samba_megatron.config.pattern import MLP, layer_symbols
from samba_megatron.model.layers import KINDS
from samba_megatron.model.layers.base import RowGroups

if TYPE_CHECKING:
    import torch

KEPT_IN_FP32 = (".A_log", ".D", ".dt_proj.bias")
"""Endings of the tensors that stay in fp32 whatever the model's dtype."""


@dataclass(frozen=True)
class TensorLink:
    """One tensor of a checkpoint and the Hugging Face tensors that hold its rows."""

    key: str
    """Key in the checkpoint."""
    parts: dict[str, int | None]
    """Hugging Face name → rows in one group; None: the whole tensor, whatever its shape."""
    groups: int = 1

    @property
    def kept_in_fp32(self) -> bool:
        """Whether it is in fp32 in every model."""
        return self.key.endswith(KEPT_IN_FP32)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the parts of a tensor of the given shape.

        Raises:
            ValueError: if its rows are not those of the parts.
        """
        if None in self.parts.values():
            return dict.fromkeys(self.parts, shape)
        rows = self._rows()
        if self.groups * sum(rows.values()) != shape[0]:
            raise ValueError(f"{self.key} has {shape[0]} rows, not {self.groups}x{rows}")
        return {name: (self.groups * count, *shape[1:]) for name, count in rows.items()}

    def split(self, tensor: "torch.Tensor") -> "Iterator[tuple[str, torch.Tensor]]":
        """The Hugging Face tensors, each contiguous; of an unsplit tensor itself."""
        if None in self.parts.values():
            yield from ((name, tensor) for name in self.parts)
            return
        rows = self._rows()
        grouped = tensor.unflatten(0, (self.groups, sum(rows.values())))
        pieces = grouped.split(list(rows.values()), dim=1)
        for name, piece in zip(rows, pieces, strict=True):
            yield name, piece.flatten(0, 1)

    def join(self, parts: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The checkpoint's tensor from its parts; the inverse of :meth:`split`."""
        import torch

        if None in self.parts.values():
            return parts[next(iter(self.parts))]
        pieces = [
            parts[name].unflatten(0, (self.groups, count)) for name, count in self._rows().items()
        ]
        return torch.cat(pieces, dim=1).flatten(0, 1)

    def _rows(self) -> dict[str, int]:
        return {name: count for name, count in self.parts.items() if count is not None}


def tensor_links(model: ModelConfig) -> list[TensorLink]:
    """All tensors of a model, in the order of its layers."""
    links = [_whole("embedding.word_embeddings.weight", "backbone.embeddings.weight")]
    symbols = layer_symbols(model.hybrid_layer_pattern)
    for number, (symbol, block) in enumerate(zip(symbols, block_numbers(symbols), strict=True)):
        for key, target in KINDS[symbol].huggingface_names(model).items():
            links.append(
                _link(f"decoder.layers.{number}.{key}", f"backbone.layers.{block}.", target)
            )
    links.append(_whole("decoder.final_norm.weight", "backbone.norm_f.weight"))
    if not model.share_embeddings_and_output_weights:
        links.append(_whole("output_layer.weight", "lm_head.weight"))
    return links


def block_numbers(symbols: str) -> list[int]:
    """The Hugging Face block of every layer, from 0."""
    numbers: list[int] = []
    has_mlp = True
    block = -1
    for symbol in symbols:
        if symbol != MLP or has_mlp:
            block += 1
        has_mlp = symbol == MLP
        numbers.append(block)
    return numbers


def _whole(key: str, name: str) -> TensorLink:
    return TensorLink(key, {name: None})


def _link(key: str, prefix: str, target: str | RowGroups) -> TensorLink:
    if isinstance(target, str):
        return _whole(key, prefix + target)
    parts: dict[str, int | None] = {prefix + name: rows for name, rows in target.parts.items()}
    return TensorLink(key, parts, target.groups)
