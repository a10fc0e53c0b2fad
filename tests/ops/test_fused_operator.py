"""The fused scan and SwiGLU as operators of torch: what compilers, FLOP counters and autograd see.

On a CPU the scan's kernels are emulated (see emulated_primitives.h) and SwiGLU's interpreted.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samba_megatron.ops import cost
from samba_megatron.ops.selective_scan import fused_operator, selective_scan
from samba_megatron.ops.selective_scan.fused import BACKEND
from samba_megatron.ops.selective_scan.fused.layout import Variant
from samba_megatron.ops.selective_scan.fused.scan import (
    ELEMENTS,
    Arguments,
    activation_dtype,
    fused_scan,
    prepare,
)
from samba_megatron.ops.swiglu import swiglu, triton_swiglu
from tests.compiling import must_compile
from tests.ops import emulated_kernels
from tests.ops.comparing import Inputs, assert_near, assert_same_bits, run
from tests.ops.emulated_kernels import EmulatedKernels
from tests.ops.interpreting import interpret
from tests.ops.test_rotary import check_operators as check_rotary
from tests.ops.test_swiglu import check_operators

LENGTH, BATCH, CHANNELS, STATES = 40, 2, 6, 8  # two chunks
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")

needs_compiler = pytest.mark.skipif(
    emulated_kernels.COMPILER is None, reason="needs g++ to emulate the kernels"
)


def emulated(folder: Path) -> Callable[..., EmulatedKernels]:
    """Finds kernels for a CPU, as `device_kernels` for a GPU."""

    @cache
    def lookup(
        element: int, states: int, gated: bool, softplus: bool, device: int
    ) -> EmulatedKernels:
        return EmulatedKernels(Variant(element, states, gated, softplus), folder, workers=3)

    return lookup


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated_kernels")


@pytest.fixture(scope="module")
def kernels(folder):
    """Finds kernels for a CPU; while it is there, the operators do too."""
    with pytest.MonkeyPatch.context() as patch:
        lookup = emulated(folder)
        patch.setitem(fused_operator.LOOKUPS, "cpu", lookup)
        yield lookup


def make_inputs(dtype: torch.dtype = torch.float32, **others: torch.dtype) -> Inputs:
    """Activations in a dtype, but for the named; u and z are halves, B and C parts of a tensor."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    u, z = normal(LENGTH, BATCH, 2 * CHANNELS).to(dtype).chunk(2, -1)
    _, B, C = normal(LENGTH, BATCH, 3 + 2 * STATES).to(dtype).split([3, STATES, STATES], -1)
    inputs = {
        "u": u,
        "delta": normal(LENGTH, BATCH, CHANNELS).to(dtype),
        "A": -torch.exp(normal(CHANNELS, STATES)),
        "B": B,
        "C": C,
        "D": normal(CHANNELS),
        "z": z,
        "delta_bias": normal(CHANNELS) - 2,
        "initial_state": normal(BATCH, CHANNELS, STATES),
        "reset": torch.rand(LENGTH, BATCH, generator=generator) < 0.1,
    }
    return inputs | {name: inputs[name].to(other) for name, other in others.items()}


CALLS: dict[str, Inputs] = {
    "fp32": make_inputs(),
    "several dtypes": make_inputs(torch.bfloat16, delta=torch.float32, A=torch.bfloat16),
    "transposed": make_inputs() | {"u": torch.randn(LENGTH, CHANNELS, BATCH).transpose(1, 2)},
    "without options": make_inputs() | dict.fromkeys(OPTIONAL),
}


def arguments(inputs: Inputs) -> Arguments:
    return Arguments(*(inputs.get(name) for name in Arguments._fields))  # type: ignore[arg-type]


def by_function(kernels: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The scan by its autograd function."""
    a = arguments(inputs)
    element = ELEMENTS[activation_dtype(a)]
    return fused_scan(kernels(element, STATES, a.z is not None, True, -1), a)


def by_operator(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return fused_operator.run_operators(arguments(inputs), delta_softplus=True)


@needs_compiler
@pytest.mark.parametrize(
    ("call", "outputs"),
    [*((call, (0, 1)) for call in CALLS), ("fp32", (0,)), ("fp32", (1,))],
)
def test_the_operator_is_the_function_bit_by_bit(kernels, call, outputs):
    """Outputs and all gradients; also where one of the two outputs has none."""

    def pick(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(found[i] for i in outputs)

    expected = run(lambda **x: pick(by_function(kernels, x)), CALLS[call])
    assert_same_bits(run(lambda **x: pick(by_operator(x)), CALLS[call]), expected)


@needs_compiler
@pytest.mark.parametrize("call", ["fp32", "several dtypes", "transposed"])
def test_the_operator_keeps_what_the_function_keeps(kernels, call):
    def kept(scan: Callable[[Inputs], Any]) -> dict[int, int]:
        """Bytes that wait for the backward, by their place; beside the arguments."""
        found: dict[int, int] = {}
        leaves: Inputs = {
            name: None if t is None else t.detach().requires_grad_(t.is_floating_point())
            for name, t in CALLS[call].items()
        }

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = scan(leaves)
        given = {t.untyped_storage().data_ptr() for t in leaves.values() if t is not None}
        assert len(outputs) == 2  # and alive until here
        return {place: size for place, size in found.items() if place not in given}

    by_both = [kept(lambda x: by_function(kernels, x)), kept(by_operator)]
    assert sorted(by_both[0].values()) == sorted(by_both[1].values())
    assert by_both[0]


@needs_compiler
def test_without_gradients_nothing_is_kept(kernels):
    a = prepare(arguments(CALLS["fp32"]))
    assert fused_operator.SCAN(*a, True, False)[2].numel() == 0
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in a]
    with pytest.raises(RuntimeError, match="must keep its checkpoints"):
        fused_operator.SCAN(*leaves, True, False)
    with pytest.raises(ValueError, match="needs a position"):
        by_operator({name: t[:0] if name == "u" else t for name, t in CALLS["fp32"].items()})


@needs_compiler
def test_a_second_derivative_is_refused(kernels):
    leaf = CALLS["fp32"]["u"].detach().requires_grad_()
    y, _ = by_operator(CALLS["fp32"] | {"u": leaf})
    (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


@needs_compiler
@pytest.mark.parametrize("call", ["transposed", "without options"])
def test_the_operators_are_what_torch_asks_of_them(kernels, call):
    """Schema, fake tensors (also with sizes unknown) and gradients, by torch's own check."""
    a = [None if t is None else t.detach().clone() for t in prepare(arguments(CALLS[call]))]
    y, state, checkpoints = fused_operator.SCAN(*a, True, True)
    gradients = (torch.randn_like(y), torch.randn_like(state))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if call == "transposed":  # the dearest once
        tests.append("test_aot_dispatch_dynamic")
    arguments_backward = (*a, True, checkpoints, *gradients)
    torch.library.opcheck(fused_operator.SCAN_BACKWARD, arguments_backward, test_utils=tests)
    leaves = [None if t is None else t.requires_grad_(t.is_floating_point()) for t in a]
    torch.library.opcheck(fused_operator.SCAN, (*leaves, True, True), test_utils=tests)


def mixer(inputs: Inputs) -> tuple[Tensor, Tensor]:
    y, state = by_operator(inputs)
    return triton_swiglu.swiglu_triton(torch.cat([y, inputs["delta"].to(y.dtype)], -1)), state


def compare(folder: str) -> None:
    """Both operators in one compiled function; SwiGLU's by Triton's interpreter."""
    check_operators()
    check_rotary()
    fused_operator.LOOKUPS["cpu"] = emulated(Path(folder))
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    inputs = CALLS["several dtypes"]
    expected = run(lambda **x: mixer(x), inputs)
    with must_compile():
        assert_same_bits(run(lambda **x: compiled(x), inputs), expected)
    with FlopCounterMode(display=False) as counter:
        run(lambda **x: mixer(x), CALLS["fp32"])
    flops = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    scan = cost.scan_flops(LENGTH * BATCH, CHANNELS, STATES)
    gate = cost.swiglu_work(LENGTH * BATCH, CHANNELS, 4)
    assert flops == {
        "samba_megatron.selective_scan": scan,
        "samba_megatron.selective_scan_backward": 2 * scan,
        "samba_megatron.swiglu": gate.forward.flops,
        "samba_megatron.swiglu_backward": gate.backward.flops,
    }


@needs_compiler
def test_a_compiled_function_is_the_eager_one_and_flops_are_counted(kernels, folder):
    interpret("tests.ops.test_fused_operator", str(folder))


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    """Through the dispatch, by the compiler that makes kernels of all around."""
    if reason := BACKEND.unavailable():
        pytest.skip(f"fused: {reason}")
    length, batch, channels, states = 500, 2, 256, 16
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", dtype)

    inputs = {
        "x": normal(length, batch, channels),
        "weight": normal(3 * channels + 2 * states, channels) * channels**-0.5,
        "A_log": normal(channels, states, dtype=torch.float32),
        "bias": normal(channels, dtype=torch.float32) - 2,
    }

    def small_mixer(x: Tensor, weight: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
        projected = torch.nn.functional.linear(x, weight)
        u, delta, z, B, C = projected.split([channels] * 3 + [states] * 2, -1)
        A = -torch.exp(A_log)
        y, _ = selective_scan(u, delta, A, B, C, z=z, delta_bias=bias, backend="fused")
        return swiglu(torch.cat([y, x], -1), backend="triton")

    compiled = torch.compile(small_mixer, fullgraph=True)
    assert_near(run(compiled, inputs), run(small_mixer, inputs), 2**-6)
