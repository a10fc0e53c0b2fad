"""Compares the sharded operations with the whole sequence on one process.

Rank 0 draws the cases (hypothesis shrinks a failing one) and tells the others; every rank computes
the whole in fp64 by the references, its own part by the sharded operation, and compares outputs
and gradients. Prints one JSON line: the cases seen and the bytes sent in a case of known sizes.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.context_parallel import (
    RankCarry,
    exchange,
    sharded_causal_conv1d,
    sharded_windowed_attention,
)
from samba_megatron.ops.selective_scan import selective_scan
from samba_megatron.ops.windowed_attention import windowed_attention

Case = dict[str, Any]
Tensors = dict[str, Tensor]
STATES, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 5
PER_POSITION = ("x", "delta", "B", "C", "z", "q", "k", "v")
TOLERANCE = 1e-12
EXAMPLES = 40
COUNTED = {"ranks": 4, "length": 8, "batch": 2, "width": 4, "window": 12}
"""The case whose bytes are counted."""
CHANNELS = 6


@st.composite
def cases(draw: Any) -> Case:
    """Sizes on both sides of every edge, and where documents start."""
    ranks, length = draw(st.sampled_from([2, 4])), draw(st.integers(1, 9))
    batch, total = draw(st.integers(1, 2)), ranks * length
    # Starts at 1, at the pieces' edges and anywhere; none at all: a document longer than a piece.
    edges = [1, length - 1, length, length + 1, total - length]
    start = st.sampled_from([e for e in edges if 0 <= e < total]) | st.integers(0, total - 1)
    return {
        "ranks": ranks,
        "length": length,
        "batch": batch,
        "width": draw(st.integers(1, 5)),
        "window": draw(st.none() | st.integers(1, 2 * length + 1) | st.integers(1, 40)),
        "starts": draw(
            st.none() | st.lists(st.lists(start, max_size=4), min_size=batch, max_size=batch)
        ),
        "seed": draw(st.integers(0, 2**30)),
    }


def draw_tensors(case: Case) -> Tensors:
    """All arguments for the whole sequence, the same on every rank."""
    generator = torch.Generator().manual_seed(case["seed"])
    total, batch, channels = case["ranks"] * case["length"], case["batch"], CHANNELS

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tensors = {
        **{name: normal(total, batch, channels) for name in ("x", "delta", "z")},
        **{name: normal(total, batch, STATES) for name in ("B", "C")},
        "q": normal(total, batch, HEADS, HEAD_DIM),
        **{name: normal(total, batch, KV_HEADS, HEAD_DIM) for name in ("k", "v")},
        "weight": normal(channels, 1, case["width"]),
        "bias": normal(channels),
        "A": -torch.exp(normal(channels, STATES)),
        "D": normal(channels),
        "delta_bias": normal(channels) - 2,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def reset_of(case: Case) -> Tensor | None:
    """bool [whole sequence, batch], True where a document starts."""
    if case["starts"] is None:
        return None
    reset = torch.zeros(case["ranks"] * case["length"], case["batch"], dtype=torch.bool)
    for sequence, starts in enumerate(case["starts"]):
        reset[starts, sequence] = True
    return reset


def whole(t: Tensors, case: Case) -> Tensors:
    """The three operations over the whole sequence, by their references."""
    reset = reset_of(case)
    return {
        "conv": causal_conv1d(t["x"], t["weight"], t["bias"], reset=reset, backend="reference"),
        "attention": windowed_attention(
            t["q"], t["k"], t["v"], window=case["window"], reset=reset, backend="reference"
        ),
        "scan": _scan(t, reset, backend="reference"),
    }


def _scan(t: Tensors, reset: Tensor | None, **how: Any) -> Tensor:
    arguments = (t["x"], t["delta"], t["A"], t["B"], t["C"], t["D"], t["z"], t["delta_bias"])
    return selective_scan(*arguments, reset=reset, **how)[0]


def sharded(t: Tensors, case: Case, group: ProcessGroup, only: str = "") -> Tensors:
    """The same for one rank's positions; ``only`` names a single operation."""
    reset = reset_of(case)
    window = case["window"]
    own = None if reset is None else own_part(reset, group)
    operations = {
        "conv": lambda: sharded_causal_conv1d(t["x"], t["weight"], t["bias"], group, reset=reset),
        "attention": lambda: sharded_windowed_attention(
            t["q"], t["k"], t["v"], group, window=window, reset=reset
        ),
        "scan": lambda: _scan(t, own, carry=RankCarry(group)),
    }
    return {name: run() for name, run in operations.items() if only in ("", name)}


def own_part(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """A rank's positions."""
    return tensor.chunk(group.size())[group.rank()]


def compare(case: Case, group: ProcessGroup) -> dict[str, float]:
    """Largest relative error over the ranks, by output and gradient."""
    given = draw_tensors(case)
    expected = whole(given, case)
    total = case["ranks"] * case["length"]
    _backward(expected, total, lambda tensor: tensor)
    local = {
        name: (own_part(t, group) if name in PER_POSITION else t).detach().requires_grad_()
        for name, t in given.items()
    }
    actual = sharded(local, case, group)
    _backward(actual, total, lambda tensor: own_part(tensor, group))
    errors = {
        name: _error(actual[name], own_part(expected[name], group), expected[name])
        for name in actual
    }
    for name, tensor in local.items():
        want, got = _gradient(given[name]), _gradient(tensor)
        if name in PER_POSITION:
            errors[f"d{name}"] = _error(got, own_part(want, group), want)
        else:  # a parameter: the ranks' gradients add up
            torch.distributed.all_reduce(got, group=group)
            errors[f"d{name}"] = _error(got, want, want)
    return _worst(errors)


def _backward(outputs: Tensors, length: int, part: Callable[[Tensor], Tensor]) -> None:
    """Differentiates a fixed random form of the outputs, of which ``part`` is this rank's."""
    loss = torch.zeros((), dtype=torch.float64)
    for seed, output in enumerate(outputs.values()):
        generator = torch.Generator().manual_seed(seed)
        shape = (length, *output.shape[1:])
        form = torch.randn(shape, generator=generator, dtype=torch.float64)
        loss = loss + (output * part(form)).sum()
    loss.backward()


def _gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def _error(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    # Of a gradient that is zero but for rounding, the scale is that of what cancels in it.
    largest = max(float(scale.detach().abs().max()), 1.0)
    return float((actual - expected).detach().abs().max()) / largest


def _worst(errors: dict[str, float]) -> dict[str, float]:
    """Over all ranks of the world."""
    values = torch.tensor(list(errors.values()), dtype=torch.float64)
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(errors, values.tolist(), strict=True))


def count_bytes(groups: dict[int, ProcessGroup]) -> dict[str, int]:
    """Bytes that the busiest rank of four sends, by operation and direction."""
    case = {**COUNTED, "starts": None}
    group, sent = groups[4], [0]

    class Counted(torch.distributed.P2POp):
        def __init__(self, function: Any, tensor: Tensor, **where: Any) -> None:
            super().__init__(function, tensor, **where)
            if function is torch.distributed.isend:
                sent[0] += tensor.numel() * tensor.element_size()

    def most() -> int:
        """Since the last question, of any rank."""
        value = torch.tensor(sent[0])
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        sent[0] = 0
        return int(value)

    tensors = {
        name: (own_part(t, group) if name in PER_POSITION else t).detach().requires_grad_()
        for name, t in draw_tensors(case | {"seed": 0}).items()
    }
    counts = {}
    original, exchange.P2POp = exchange.P2POp, Counted  # type: ignore[assignment,misc]
    try:
        for name in ("conv", "attention", "scan"):
            output = sharded(tensors, case, group, only=name)[name]
            counts[f"{name}_forward"] = most()
            output.sum().backward()
            counts[f"{name}_backward"] = most()
    finally:
        exchange.P2POp = original  # type: ignore[misc]
    return counts


def main() -> None:
    """All cases in one world of four ranks."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    pairs = [torch.distributed.new_group(pair) for pair in ([0, 1], [2, 3])]
    four = torch.distributed.new_group([0, 1, 2, 3])
    groups = {2: pairs[rank // 2], 4: four}
    seen = [0]

    def told(case: Case | None) -> Case | None:
        box = [case]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    @settings(max_examples=EXAMPLES, deadline=None, database=None)
    @given(case=cases())
    def check(case: Case) -> None:
        told(case)
        seen[0] += 1
        errors = compare(case, groups[case["ranks"]])
        assert max(errors.values()) < TOLERANCE, errors

    if rank == 0:
        try:
            check()
        finally:
            told(None)
    else:
        while (case := told(None)) is not None:
            compare(case, groups[case["ranks"]])
    counts = count_bytes(groups)
    if rank == 0:
        print(json.dumps({"cases": seen[0], "bytes": counts}), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
