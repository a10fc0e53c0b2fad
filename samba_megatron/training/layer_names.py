"""Which layer of the whole model a tensor of this rank's part belongs to, for people."""

import re
from collections.abc import Sequence
from typing import Any

from samba_megatron.model.layers import KINDS

_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.(.*))?")


def layer_place(chunk: Any, name: str) -> tuple[int, str]:
    """(layer number over the whole model, name within the layer) of a module or parameter.

    The embedding is number 0; what follows the layers has the number after the last.

    Args:
        chunk: the model chunk (without its data-parallel wrapper).
        name: within the chunk, as ``named_modules`` or ``named_parameters`` has it.
    """
    if name.startswith("embedding"):
        return 0, name
    match = _LAYER.match(name)
    if match is None:
        return len(chunk.layer_symbols) + 1, name
    return chunk.decoder.layers[int(match[1])].layer_number, match[2] or ""


def layer_title(number: int, symbols: Sequence[str]) -> str:
    """``layer 3 (mamba)``; ``embedding`` and ``head`` before and after the layers."""
    if number == 0:
        return "embedding"
    if number > len(symbols):
        return "head"
    return f"layer {number} ({KINDS[symbols[number - 1]].name})"


def bare(chunk: Any) -> Any:
    """A model chunk without its data-parallel wrapper."""
    return getattr(chunk, "module", chunk)
