"""A sequence computed piece by piece is the sequence computed whole, gradients included."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.continued import (
    Past,
    continued_causal_conv1d,
    continued_selective_scan,
    continued_windowed_attention,
)
from samba_megatron.ops.selective_scan import selective_scan
from samba_megatron.ops.windowed_attention import windowed_attention
from tests.ops.comparing import assert_near, run

LENGTH, BATCH, CHANNELS, STATES = 24, 2, 4, 3


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def pieces_of(x: Tensor, number: int) -> list[Tensor]:
    return list(x.split(LENGTH // number))


def in_pieces(number: int, one: Callable[..., Tensor], *along_time: Tensor) -> Tensor:
    """``one(past, *pieces)`` for each piece in turn; what they leave stays in the graph."""
    before, outputs = dict[str, Tensor](), []
    for index, pieces in enumerate(zip(*(pieces_of(x, number) for x in along_time), strict=True)):
        past = Past(index * LENGTH // number, before)
        outputs.append(one(past, *pieces))
        before = past.after
    return torch.cat(outputs)


CASES = {
    "number": st.sampled_from([1, 2, 3, 4, 8, 12]),
    "starts": st.none()
    | st.lists(st.tuples(st.integers(0, LENGTH - 1), st.integers(0, BATCH - 1)), max_size=6),
}


def reset_at(starts: list[tuple[int, int]] | None) -> Tensor | None:
    if starts is None:
        return None
    reset = torch.zeros(LENGTH, BATCH, dtype=torch.bool)
    for position, row in starts:
        reset[position, row] = True
    return reset


@settings(max_examples=25, derandomize=True)
@given(**CASES)
def test_convolution(number: int, starts: list[tuple[int, int]] | None) -> None:
    inputs = {
        "x": normal(LENGTH, BATCH, CHANNELS),
        "weight": normal(CHANNELS, 4),
        "bias": normal(CHANNELS),
    }
    reset = reset_at(starts)

    def continued(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return in_pieces(
            number,
            lambda past, piece: continued_causal_conv1d(piece, weight, bias, past, "c", reset),
            x,
        )

    assert_near(run(continued, inputs), run(causal_conv1d, inputs, reset=reset), 1e-12)


@settings(max_examples=25, derandomize=True)
@given(**CASES)
def test_scan(number: int, starts: list[tuple[int, int]] | None) -> None:
    inputs = {
        "u": normal(LENGTH, BATCH, CHANNELS),
        "delta": normal(LENGTH, BATCH, CHANNELS) - 1,
        "A": -normal(CHANNELS, STATES).exp(),
        "B": normal(LENGTH, BATCH, STATES),
        "C": normal(LENGTH, BATCH, STATES),
        "D": normal(CHANNELS),
    }
    reset = reset_at(starts)

    def continued(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        def one(past: Past, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return continued_selective_scan(u, delta, A, B, C, past, "s", reset=reset, D=D)

        return in_pieces(number, one, u, delta, B, C)

    def whole(**inputs: Any) -> Tensor:
        return selective_scan(**inputs, reset=reset)[0]

    assert_near(run(continued, inputs), run(whole, inputs), 1e-12)


@settings(max_examples=25, derandomize=True)
@given(window=st.sampled_from([1, 2, 5, 13, 40, None]), **CASES)
def test_attention(number: int, starts: list[tuple[int, int]] | None, window: int | None) -> None:
    inputs = {
        "q": normal(LENGTH, BATCH, 4, 2),
        "k": normal(LENGTH, BATCH, 2, 2),
        "v": normal(LENGTH, BATCH, 2, 2) + 1,
    }
    reset = reset_at(starts)

    def continued(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def one(past: Past, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return continued_windowed_attention(q, k, v, past, "a", window, reset=reset)

        return in_pieces(number, one, q, k, v)

    expected = run(windowed_attention, inputs, window=window, reset=reset)
    assert_near(run(continued, inputs), expected, 1e-12, least_scale=1.0)
