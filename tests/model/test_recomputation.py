"""What is recomputed is not kept, and changes no bit."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from samba_megatron.config import ParallelConfig
from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.model.layers import KINDS
from samba_megatron.model.recomputation import (
    dropped,
    recomputable,
    recomputable_with_graph,
    same_memory,
)
from samba_megatron.model.samba import build_model
from samba_megatron.model.sequence import documents_apart
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import layer_bytes
from samba_megatron.platform import distributed
from tests.model.documents_ranks import layout
from tests.model.isolation import LENGTH, SEQUENCES, TORCH, VOCABULARY, toy_run
from tests.model.recomputing import ALL, PACKING, TOGETHER, differences, recomputing


@pytest.fixture(scope="module", autouse=True)
def world():
    """Ends what the tests began."""
    yield
    distributed.shutdown()


class Counted:
    """A function that knows its calls and its latest result."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0
        self.result: Callable[[], Any] = lambda: None

    def __call__(self, *arguments: Tensor) -> Any:
        self.calls += 1
        result = self.function(*arguments)
        first = result[0] if isinstance(result, tuple) else result
        self.result = weakref.ref(first.untyped_storage())
        return result


def read(y: Tensor, *others: Tensor) -> Tensor:
    """Two readers of ``y``, one of them of a part."""
    with dropped(y, *others):
        return (y[1:] ** 2).sum() + (y * 3).exp().sum()


def test_two_readers_compute_it_once_and_let_it_go() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    function = Counted(torch.sin)
    loss = read(recomputable(function, x))
    assert function.calls == 1 and function.result() is None, "it is kept after the forward pass"
    loss.backward()
    assert function.calls == 2 and function.result() is None, "it is kept after the backward pass"
    again = x.detach().requires_grad_()
    read(torch.sin(again)).backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=0, atol=0)


def test_what_is_read_outside_is_kept() -> None:
    x = torch.randn(8, 16, requires_grad=True)
    function = Counted(torch.sin)
    y = recomputable(function, x)
    loss = y.exp().sum() + (y**2).sum()
    loss.backward()
    assert function.calls == 1
    with torch.no_grad():
        assert not hasattr(recomputable(function, x), "computed_by"), "nothing will be read again"


def test_a_recipe_of_a_recipe_keeps_neither() -> None:
    """As the scan, which reads the convolution: its graph is let go, and its first result."""
    x, w = (torch.randn(8, 16, requires_grad=True) for _ in range(2))
    inner, outer = Counted(torch.sin), Counted(lambda u, v: ((u * v).exp(), (u + v).sum()))

    def run(inner: Any, outer: Any) -> Tensor:
        u = recomputable(inner, x)
        with dropped(u):
            y, total = recomputable_with_graph(outer, u, w)
        return read(same_memory(y.view(4, 32), y), u) + total * 2

    loss = run(inner, outer)
    assert inner.result() is None and outer.result() is None
    loss.backward()
    assert (inner.calls, outer.calls) == (2, 2)
    assert inner.result() is None and outer.result() is None
    found, x.grad, w.grad = (x.grad, w.grad), None, None
    u = torch.sin(x)
    (read((u * w).exp().view(4, 32)) + (u + w).sum() * 2).backward()
    torch.testing.assert_close(found, (x.grad, w.grad), rtol=0, atol=0)


def test_a_linear_without_a_graph_gives_what_it_is_asked_for() -> None:
    """The second output alone has a gradient; inputs that need none get none."""
    x, w = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    _, second = recomputable_with_graph(lambda u, v: (F.linear(u, v), (u + v).sum()), x, w)
    second.backward()
    torch.testing.assert_close(w.grad, torch.ones(4, 4), rtol=0, atol=0)
    assert x.grad is None


@pytest.mark.parametrize("apart", [True, False], ids=["documents", "one document"])
def test_no_bit_changes(apart: bool) -> None:
    """Of outputs, losses and gradients: each name alone and together, on one process; several are
    in test_documents.py."""
    lists = [*([name] for name in ALL), *TOGETHER] if apart else [ALL]
    assert differences(ParallelConfig(), lists, apart) == []


def kept_bytes(parallel: ParallelConfig, end_to_end: bool = False) -> int:
    """What is still allocated when a forward pass is done."""
    chunk: Any = build_model(toy_run(TORCH, parallel), "local")[0]
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH))
    sequence = documents_apart(PACKING.document_start()[:SEQUENCES], "cpu", end_to_end)
    tokens = tokens.reshape(1, -1) if end_to_end else tokens
    forward = partial(chunk, tokens, None, None, labels=tokens, packed_seq_params=sequence)
    with torch.no_grad():
        forward()  # what is made once is there by now
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        losses = forward()
    kept = sum(event.self_cpu_memory_usage for event in profiler.events())
    assert losses.requires_grad
    return kept


def planned_bytes(parallel: ParallelConfig) -> float:
    """What the planner says that the layers keep."""
    config = toy_run(TORCH, parallel)
    layers = layer_symbols(config.model.hybrid_layer_pattern)
    config = replace(config, precision=replace(config.precision, params_dtype="fp32"))
    placed = Layout(config, 1)
    return SEQUENCES * LENGTH * sum(layer_bytes(placed, symbol) for symbol in layers)


def test_the_memory_is_free_as_planned() -> None:
    """Allocated bytes after the forward pass: to a number a token, each name and all together.

    The torch scan keeps a state every 16 positions in fp32, as many bytes as the planner counts for
    every 32 of a fused scan in a type of half the size, which this model is not.
    """
    with layout(ParallelConfig()):
        planned, number = planned_bytes(ParallelConfig()), 4 * SEQUENCES * LENGTH
        for end_to_end, lists in ((False, [*([name] for name in ALL), ALL]), (True, [ALL])):
            kept = kept_bytes(ParallelConfig(), end_to_end)
            for names in lists:
                parallel = recomputing(ParallelConfig(), names)
                saved = kept - kept_bytes(parallel, end_to_end)
                expected = planned - planned_bytes(parallel)
                assert expected >= 4 * number
                assert saved == pytest.approx(expected, abs=2 * number), (names, end_to_end)


def test_names_and_layers_are_those_of_the_configuration() -> None:
    model = toy_run(TORCH, ParallelConfig()).model
    found = {
        name: {symbol for symbol in KINDS if name in KINDS[symbol].recomputable_parts(model)}
        for name in RECOMPUTABLE_PARTS
    }
    assert found == {name: set(symbols) for name, symbols in RECOMPUTABLE_PARTS.items()}
