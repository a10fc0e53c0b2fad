"""What comes after a text that has been read, token by token, and its letters as they come.

All that a step changes are tensors that stay where they are: states, rings, the place in them, the
last token. So a CUDA graph can hold a step, and a token takes as long as the device needs, not
Python. The step is the same function without a graph, on a CPU too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from samba_megatron.data.tokenizer import Tokenizer

_EAGER_STEPS = 2
"""That come before a capture: kernels are compiled and libraries find their memory."""
_CONTEXT = 8
"""Tokens before the new ones that are decoded with them: some tokenizers write a word's first
letter according to what precedes it."""
_BYTES = 4
"""Of a character, at most: as many tokens may pass before it can be shown."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen."""

    temperature: float | None = None
    """None: the likeliest one."""
    top_p: float = 1.0
    """Of the likeliest tokens, which have so much of the probability together."""

    def choose(self, logits: Tensor) -> Tensor:
        """[b, vocabulary] → [b]; nothing in it waits for the device."""
        if self.temperature is None:
            return logits.argmax(-1)
        scores, order = (logits.float() / self.temperature).sort(-1, descending=True)
        chances = scores.softmax(-1)
        if self.top_p < 1:
            before = chances.cumsum(-1) - chances
            chances = chances.masked_fill(before >= self.top_p, 0.0)
        # The least of exponential times at these rates; as torch.multinomial, but without a check.
        first = (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)
        return order.gather(-1, first).squeeze(-1)


class Continuation:
    """Writes on from a cache, a token a step for each text of a batch without padding."""

    def __init__(self, model: Any, cache: Any, logits: Tensor, sampling: Sampling, room: int):
        """Args:
        model: a causal language model of transformers.
        cache: what it remembers of the text; it belongs to this object from now on.
        logits: [b, vocabulary] after the text's last token.
        sampling: how tokens are chosen.
        room: how many tokens may follow.
        """
        self._model, self.cache, self._choose = model, cache, sampling.choose
        self.is_still = _can_be_still(cache)
        """Whether a step changes nothing but tensors in their places."""
        seen = cache.get_seq_length()
        with torch.inference_mode():
            self.token = self._choose(logits)[:, None]
            """[b, 1]: the last one."""
            self._position = torch.full((1, 1), seen, device=self.token.device)
            if self.is_still:
                _hold_still(cache, self._position, seen + room)

    def tokens(self, count: int, graph: bool) -> Iterator[list[int]]:
        """Up to ``room`` tokens, for each text one at a time.

        Args:
            count: how many.
            graph: launch steps by a CUDA graph; where that is not to be had, stderr says why.
        """
        launch: Callable[[], None] = self._step
        for number in range(count):
            if graph and number == 1 + _EAGER_STEPS:
                launch = self._captured()
            if number:
                launch()
            yield self.token[:, 0].tolist()

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph, or as it is."""
        reason = f"{type(self.cache).__name__} moves its tensors"
        if self.is_still:
            try:
                replay: Callable[[], None] = captured(self._step).replay
                return replay
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
        print(f"no CUDA graph ({reason}): Python launches each token", file=sys.stderr)
        return self._step

    @torch.inference_mode()
    def _step(self) -> None:
        if not self.is_still:
            output = self._model(self.token, past_key_values=self.cache, use_cache=True)
            self.token = self._choose(output.logits[:, -1])[:, None]
            return
        held = [(state, state.tensors()) for state in self.cache.states]
        output = self._model(
            self.token, position_ids=self._position, past_key_values=self.cache, use_cache=True
        )
        for state, tensors in held:
            _put_back(state, tensors)
        self.token.copy_(self._choose(output.logits[:, -1])[:, None])
        self._position.add_(1)


def captured(step: Callable[[], object]) -> Any:
    """A CUDA graph of a step: what the device does, without the time to launch it from Python.

    The step must have run before. It does not run here, ``replay()`` of the result does it.

    Raises:
        RuntimeError: the step holds what cannot be captured.
    """
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        # A capture that fails leaves its own stream behind.
        torch.cuda.set_stream(stream)
    return graph


# Caches that stay in place


class _StillAttention:
    """A ring of keys and values whose place is counted on the device.

    Token number t lies in slot t % slots, as in the state it is made of. A query gets all slots,
    ``valid`` is false for those without a token.
    """

    def __init__(self, state: Any, position: Tensor, room: int) -> None:
        """``position`` [1, 1] is the next token's number; without a window, ``room`` tokens fit."""
        missing = 0 if state.window is not None else max(0, room - state.keys.shape[2])
        self.keys = F.pad(state.keys, (0, 0, 0, missing))
        self.values = F.pad(state.values, (0, 0, 0, missing))
        self.valid = F.pad(state.valid, (0, missing))
        self.conv_q, self.conv_k, self.conv_v = state.conv_q, state.conv_k, state.conv_v
        self._position = position

    def tensors(self) -> dict[str, Tensor]:
        """What is held, by name."""
        names = ("keys", "values", "valid", "conv_q", "conv_k", "conv_v")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def extend(self, keys: Tensor, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adds a token and returns all slots."""
        slot = self._position[0] % self.keys.shape[2]
        self.keys.index_copy_(2, slot, keys)
        self.values.index_copy_(2, slot, values)
        self.valid.index_copy_(1, slot, valid)
        return self.keys, self.values, self.valid


def _can_be_still(cache: Any) -> bool:
    """Whether it is the cache that exports ship with."""
    states = getattr(cache, "states", ())
    return bool(states) and all(hasattr(s, "scan") or hasattr(s, "extend") for s in states)


def _hold_still(cache: Any, position: Tensor, room: int) -> None:
    """Rings whose place is ``position``, with room for so many tokens in all."""
    rings = [hasattr(state, "extend") for state in cache.states]
    full = all(
        state.window is not None and state.seen >= state.window
        for state, ring in zip(cache.states, rings, strict=True)
        if ring
    )
    # Where a slot is empty it must be masked, as after padding; full rings need no mask.
    cache.padded = cache.padded or not full
    cache.states = [
        _StillAttention(state, position, room) if ring else state
        for state, ring in zip(cache.states, rings, strict=True)
    ]


def _put_back(state: Any, tensors: dict[str, Tensor]) -> None:
    """The tensors a state had before a step, with the content they have after it."""
    for name, tensor in tensors.items():
        new = getattr(state, name)
        if new is not tensor:
            tensor.copy_(new)
            setattr(state, name, tensor)


# Text


def as_text(tokenizer: "Tokenizer", before: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """What each new token adds to a text; of a character whose bytes are not all there, nothing.

    Args:
        tokenizer: of the model.
        before: the tokens before.
        tokens: the new ones.
    """
    held = list(before[-_CONTEXT:])
    shown, pending = tokenizer.decode(held), 0
    for token in tokens:
        held.append(token)
        pending += 1
        text = tokenizer.decode(held)
        if text.endswith("\ufffd") and pending < _BYTES:
            continue
        yield text[len(shown) :]
        held, pending = held[-_CONTEXT:], 0
        shown = tokenizer.decode(held)
    if pending:
        yield tokenizer.decode(held)[len(shown) :]
