"""The registry: the first able backend, refusals by name, and what it tells of itself."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from samba_megatron.ops.backends import OPERATIONS, last_backends
from samba_megatron.ops.registry import (
    ALL_DTYPES,
    CPU_AND_CUDA,
    CUDA_ONLY,
    HALF_DTYPES,
    Backend,
    Operation,
    Request,
)
from samba_megatron.platform.errors import UserError
from tests.compiling import call_apart, environment, must_compile
from tests.ranks import ROOT

CPU_FP32 = Request("cpu", torch.float32)


def backend(name: str, load: Callable[[], Callable[..., Any]] | None = None, **limits) -> Backend:
    """A backend whose kernel returns its own name."""
    defaults = {"devices": CPU_AND_CUDA, "dtypes": ALL_DTYPES, "features": frozenset()}
    return Backend(name=name, load=load or (lambda: lambda: name), **(defaults | limits))


def broken() -> Callable[..., str]:
    raise ImportError("undefined symbol: _ZN3c10\nlong tail")


def test_auto_takes_the_first_that_can_serve_the_request():
    operation = Operation(
        "op",
        [
            backend("gpu", devices=CUDA_ONLY),
            backend("absent", package="no_such_package"),
            backend("broken", load=broken),
            backend("half", dtypes=HALF_DTYPES),
            backend("small", refuses=lambda request: "too large" if request.sizes else None),
            backend("all", features=frozenset({"reset"})),
        ],
    )
    assert operation.choose("auto", CPU_FP32).run() == "small"
    assert operation.last_backend == "small"
    assert operation.choose("auto", Request("cpu", torch.bfloat16)).name == "half"
    assert operation.choose("auto", Request("cpu", torch.float32, sizes={"n": 1})).name == "all"
    reset = Request("cpu", torch.float32, frozenset({"reset"}))
    assert operation.choose("auto", reset).name == "all"
    assert operation.last_backend == "all"


@pytest.mark.parametrize(
    ("forced", "reason"),
    [
        (backend("x", devices=CUDA_ONLY), "it runs on cuda, not on cpu"),
        (backend("x", package="no_such_package"), "the package no_such_package is not installed"),
        (backend("x", load=broken), "importing it failed: undefined symbol: _ZN3c10;"),
        (backend("x", dtypes=HALF_DTYPES), "it does not take float32"),
        (backend("x"), "it does not support initial_state and reset"),
        (
            backend(
                "x",
                features=frozenset({"initial_state", "reset"}),
                refuses=lambda request: "it is too wide",
            ),
            "it is too wide",
        ),
    ],
)
def test_a_forced_backend_is_refused_with_its_reason_and_the_alternatives(forced, reason):
    features = frozenset({"initial_state", "reset"})
    operation = Operation("op", [forced, backend("other", features=features)])
    with pytest.raises(UserError) as refusal:
        operation.choose("x", Request("cpu", torch.float32, features))
    assert str(refusal.value).startswith("op backend 'x' cannot run here: ")
    assert reason in str(refusal.value)
    assert str(refusal.value).endswith("; use auto or other")
    assert operation.last_backend is None


def test_an_unknown_backend_is_answered_with_the_known_ones():
    operation = Operation("op", [backend("first"), backend("second")])
    with pytest.raises(
        UserError, match="^op backend 'x' is unknown: choose one of auto, first and"
    ):
        operation.choose("x", CPU_FP32)


def test_no_able_backend_names_each_ones_reason():
    operation = Operation("op", [backend("a", devices=CUDA_ONLY), backend("b", dtypes=HALF_DTYPES)])
    message = r"no op backend can run this call \(a: it runs on cuda.*; b: it does not take"
    with pytest.raises(UserError, match=message):
        operation.choose("auto", CPU_FP32)


def test_kernels_are_imported_once_and_only_when_needed():
    calls = []

    def load() -> Callable[..., str]:
        calls.append(1)
        return lambda: "ran"

    operation = Operation("op", [backend("first"), backend("lazy", load=load)])
    operation.choose("auto", CPU_FP32)
    assert not calls
    for _ in range(3):
        assert operation.choose("lazy", CPU_FP32).run() == "ran"
    assert len(calls) == 1


def choose_in_a_compiled_function() -> None:
    def load() -> Callable[[torch.Tensor], torch.Tensor]:
        importlib.import_module("json").loads("{}")
        return lambda x: x + 1

    never = backend("gpu", devices=CUDA_ONLY)
    first, second = (backend(name, load=load, package="torch") for name in ("first", "second"))
    operation = Operation("op", [never, first, second])

    def call(x: torch.Tensor, backend: str) -> torch.Tensor:
        request = Request(x.device.type, x.dtype, sizes={"n": x.shape[0]})
        return operation.choose(backend, request).run(x)

    assert call(torch.zeros(2), "auto").sum() == 2
    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for forced, ran in (("auto", "first"), ("second", "second")):
        with must_compile():
            assert compiled(torch.zeros(2), forced).sum() == 2
        assert operation.last_backend == ran


def test_a_compiled_function_chooses_without_a_break():
    """Whether the kernel was loaded before or is loaded while the call is traced."""
    call_apart("tests.ops.test_registry", "choose_in_a_compiled_function")


def test_a_compiled_function_loads_two_kernels_while_it_is_traced():
    """In a process that has loaded none: the second is looked up after the first."""
    code = """
import torch
from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.swiglu import swiglu
from tests.compiling import must_compile

def mixer(x, weight):
    return swiglu(causal_conv1d(x, weight, None, backend="torch"), backend="torch")

x, weight = torch.randn(8, 2, 8), torch.randn(8, 4)
with must_compile():
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")(x, weight)
assert torch.equal(compiled, mixer(x, weight))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)


def test_backends_of_all_operations():
    """Fastest first; torch is always there."""
    assert {name: list(operation.backends) for name, operation in OPERATIONS.items()} == {
        "selective_scan": ["fused", "mamba_ssm", "torch", "reference"],
        "causal_conv1d": ["causal_conv1d", "torch", "reference"],
        "windowed_attention": ["transformer_engine", "flash_attn", "torch", "reference"],
        "swiglu": ["triton", "torch"],
        "rms_norm": ["triton", "torch"],
        "rotary": ["triton", "torch"],
        "linear_cross_entropy": ["triton", "torch", "reference"],
    }
    for operation in OPERATIONS.values():
        assert operation.backends["torch"].unavailable() is None
    assert set(last_backends()) == set(OPERATIONS)


def test_costs_are_counted_without_torch():
    code = "import sys, samba_megatron.ops.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
