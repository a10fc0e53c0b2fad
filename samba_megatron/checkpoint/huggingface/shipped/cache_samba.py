"""What Samba remembers between two calls: the window's keys and values, and the Mamba states.

Shapes: b sequences, E Mamba channels with N states each.
"""

from typing import Any

import torch
from torch import Tensor

from .configuration_samba import SambaConfig


class MambaState:
    """The last inputs of a convolution [b, E, taps - 1] and the scan's state [b, E, N] in fp32."""

    def __init__(self) -> None:
        self.conv: Tensor | None = None
        self.scan: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


class AttentionState:
    """Keys and values [b, kv heads, slots, head dim] of the window, in a ring.

    Token number t lies in slot t % window. Without a window there is a slot for every token, and
    some free ones: a full buffer is copied into one larger by a quarter, not at every token.
    ``valid`` [b, slots] is false where the token was padding.
    """

    def __init__(self, window: int | None, slots: int = 0) -> None:
        self.window = window
        self.slots = slots if window is None else window
        self.seen = 0
        self.keys: Any = None
        self.values: Any = None
        self.valid: Any = None
        self.conv_q: Tensor | None = None
        self.conv_k: Tensor | None = None
        self.conv_v: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def extend(self, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds L tokens.

        Returns:
            Keys, values and validity for these tokens' queries: all slots in any order for one
            token, else the tokens before in order, then the new ones.
        """
        length, seen = keys.shape[2], self.seen
        if length == 1 or (self.window is None and seen):
            self._write(keys, values, valid)
            filled = self.seen if self.window is None else min(self.seen, self.window)
            return self.keys[:, :, :filled], self.values[:, :, :filled], self.valid[:, :filled]
        if seen:
            order = self._order(keys.device)
            keys = torch.cat([self.keys[:, :, order], keys], dim=2)
            values = torch.cat([self.values[:, :, order], values], dim=2)
            valid = torch.cat([self.valid[:, order], valid], dim=1)
        kept = length if self.window is None else min(length, self.window)
        self.seen += length - kept
        self._write(keys[:, :, -kept:], values[:, :, -kept:], valid[:, -kept:])
        return keys, values, valid

    def _order(self, device: torch.device) -> Tensor:
        """The slots of the window that a new token can see, oldest first."""
        assert self.window is not None
        count = min(self.seen, self.window - 1)
        return torch.arange(self.seen - count, self.seen, device=device) % self.window

    def _write(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        length = keys.shape[2]
        self._make_room(length, keys, valid)
        slots: Any
        if self.window is None or length == 1:
            start = self.seen % self.slots
            slots = slice(start, start + length)
        else:
            new = torch.arange(self.seen, self.seen + length, device=keys.device)
            slots = new % self.slots
        self.keys[:, :, slots] = keys
        self.values[:, :, slots] = values
        self.valid[:, slots] = valid
        self.seen += length

    def _make_room(self, length: int, keys: Tensor, valid: Tensor) -> None:
        """Slots for ``length`` tokens more."""
        held, needed = self.keys is not None, self.seen + length
        if held and (self.window is not None or needed <= self.slots):
            return
        if self.window is None:
            self.slots = max(self.slots, needed + needed // 4 if held else needed)
        batch, heads, _, dim = keys.shape
        grown = (
            keys.new_zeros(batch, heads, self.slots, dim),
            keys.new_zeros(batch, heads, self.slots, dim),
            valid.new_zeros(batch, self.slots),
        )
        if held:
            seen = slice(self.seen)
            grown[0][:, :, seen] = self.keys[:, :, seen]
            grown[1][:, :, seen] = self.values[:, :, seen]
            grown[2][:, seen] = self.valid[:, seen]
        self.keys, self.values, self.valid = grown


class SambaCache:
    """The states of all blocks between two calls."""

    is_compileable = False

    def __init__(self, config: SambaConfig, slots: int = 0) -> None:
        """Args:
        config: of the model.
        slots: tokens to make room for at once where attention has no window.
        """
        window = config.attn.get("window_size")
        self.seen = 0
        self.padded = False
        self.states = [
            MambaState()
            if letter == "M"
            else AttentionState(None if letter == "F" else window, slots)
            for letter, _ in config.blocks
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def memory(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for state in self.states for t in state.tensors().values())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the given sequences of the batch (beam search)."""
        self._apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every sequence of the batch."""
        self._apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given sequences of the batch."""
        self._apply(lambda tensor: tensor[indices])

    def _apply(self, change: Any) -> None:
        for state in self.states:
            for name, tensor in state.tensors().items():
                setattr(state, name, change(tensor))
