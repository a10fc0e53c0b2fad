"""The fused selective scan's kernels on a CPU, by emulation.

The emulation runs the very kernels (see emulated_primitives.h), so that carries, resets, segments,
the exchange between lanes and every index are tested without a GPU; what is left to one is the
processor's own arithmetic, its memory model, and speed.
"""

import ctypes
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.ops.selective_scan.fused import compiler
from samba_megatron.ops.selective_scan.fused.layout import (
    BackwardArguments,
    CombineArguments,
    ForwardArguments,
    ReduceArguments,
    Variant,
    divide,
)
from samba_megatron.ops.selective_scan.fused.scan import Arguments, fused_scan
from samba_megatron.ops.selective_scan.fused.source import kernel_source
from samba_megatron.ops.selective_scan.torch_scan import selective_scan_torch
from tests.ops import emulated_kernels
from tests.ops.comparing import Inputs, assert_near, in_stretches, run, to
from tests.ops.emulated_kernels import EmulatedKernels
from tests.ops.scan_inputs import (
    FP32,
    OPTIONAL,
    assert_rounded_once,
    expected_of,
    extreme,
    in_half,
    make_inputs,
    strided,
)

needs_compiler = pytest.mark.skipif(
    emulated_kernels.COMPILER is None, reason="needs g++ to emulate the kernels"
)


# On a CPU, by emulation


@pytest.fixture(scope="session")
def emulation_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("emulated_kernels")


def emulate(
    folder: Any, inputs: Inputs, workers: int, chunk: int = 32, softplus: bool = True
) -> tuple[dict[str, Tensor], list[str]]:
    """Outputs and gradients by the emulated kernels, and which of them ran."""
    element = {torch.float32: 0, torch.bfloat16: 2}[inputs["u"].dtype]
    states, gated = inputs["A"].shape[1], inputs["z"] is not None
    variant = Variant(element, states, gated, softplus, chunk)
    kernels = EmulatedKernels(variant, folder, workers)

    def scan(**given: Tensor) -> tuple[Tensor, Tensor]:
        return fused_scan(kernels, Arguments(*(given.get(name) for name in Arguments._fields)))  # type: ignore[arg-type]

    return run(scan, inputs), kernels.launched


@needs_compiler
@pytest.mark.parametrize(
    ("length", "batch", "channels", "workers"),
    [
        (1, 1, 1, 4),
        (7, 2, 33, 4),
        (70, 2, 130, 3),  # jobs cut between workers
        (33, 1, 260, 2),
        (300, 1, 40, 3),  # time in segments
        (270, 1, 140, 5),  # both
    ],
)
@pytest.mark.parametrize("resets", [0.0, 0.05])
def test_emulated_kernels_match_reference(
    emulation_folder, length, batch, channels, workers, resets
):
    inputs = to(make_inputs(length, batch, channels, seed=length, resets=resets), torch.float32)
    actual, launched = emulate(emulation_folder, inputs, workers)
    assert ("scan_adjoint_segments" in launched) == (length >= 270)
    assert_near(actual, expected_of(inputs), FP32)


@needs_compiler
@pytest.mark.parametrize(("length", "workers"), [(40, 3), (150, 2)])  # one segment; several
@pytest.mark.parametrize("resets", [0.0, 0.02])
def test_emulated_kernels_carried_over_stretches(emulation_folder, length, workers, resets):
    inputs = to(make_inputs(300, 1, 40, seed=length, resets=resets), torch.float32)
    inputs |= {"initial_state": None}
    kernels = EmulatedKernels(Variant(0, 16), emulation_folder, workers)

    def stretch(**given: Any) -> tuple[Tensor, Tensor]:
        carry = given.pop("carry")
        arguments = Arguments(*(given.get(name) for name in Arguments._fields))  # type: ignore[arg-type]
        return fused_scan(kernels, arguments, carry)

    actual = run(lambda **x: in_stretches(stretch, x, length), inputs)
    expected = run(lambda **x: selective_scan_torch(**x)[0], to(inputs, torch.float64))
    assert_near(actual, expected, FP32)


@needs_compiler
@pytest.mark.parametrize("absent", OPTIONAL)
def test_emulated_kernels_without_an_optional_argument(emulation_folder, absent):
    inputs = to(make_inputs(41, 2, 20, resets=0.1), torch.float32) | {absent: None}
    actual, _ = emulate(emulation_folder, inputs, workers=3)
    assert_near(actual, expected_of(inputs), FP32)


@needs_compiler
def test_emulated_kernels_without_softplus(emulation_folder):
    inputs = to(make_inputs(41, 2, 20), torch.float32) | {"delta_bias": None}
    inputs["delta"] = inputs["delta"].abs()
    actual, _ = emulate(emulation_folder, inputs, workers=3, softplus=False)
    assert_near(actual, expected_of(inputs, delta_softplus=False), FP32)


@needs_compiler
@pytest.mark.parametrize(("states", "chunk", "workers"), [(8, 32, 3), (32, 32, 3), (16, 16, 3)])
@pytest.mark.parametrize("length", [40, 260])
def test_emulated_kernels_of_other_sizes(emulation_folder, states, chunk, workers, length):
    batch = 2 if length < 100 else 1
    inputs = to(make_inputs(length, batch, 50, states, resets=0.05), torch.float32)
    actual, launched = emulate(emulation_folder, inputs, workers, chunk)
    assert ("scan_segments" in launched) == (length > 100)
    assert_near(actual, expected_of(inputs), FP32)


@needs_compiler
def test_emulated_kernels_in_bf16_and_strided(emulation_folder):
    inputs = strided(torch.bfloat16, "cpu", 45, 2, 70)
    actual, _ = emulate(emulation_folder, inputs, workers=3)
    expected = expected_of(strided(torch.bfloat16, "cpu", 45, 2, 70))
    assert_rounded_once(actual, expected, torch.bfloat16)


@needs_compiler
def test_emulated_kernels_with_pairs_at_odd_places(emulation_folder):
    """The emulation aborts where a pair is read across two."""
    inputs = to(in_half(make_inputs(9, 2, 6), torch.bfloat16), "cpu")
    expected = expected_of(inputs)
    for name in ("u", "delta", "z"):
        inputs[name] = torch.cat([inputs["B"][..., :1], inputs[name]], -1)[..., 1:]
    actual, _ = emulate(emulation_folder, inputs, workers=3)
    assert_rounded_once(actual, expected, torch.bfloat16)


@needs_compiler
def test_emulated_results_lie_as_the_inputs_do(emulation_folder):
    """Sequences end to end in memory come out so; no bit differs."""
    side = to(make_inputs(35, 3, 22, resets=0.1), torch.float32)
    end = dict(side)
    for name in ("u", "delta", "z", "B", "C"):
        end[name] = side[name].transpose(0, 1).contiguous().transpose(0, 1)
    results = [emulate(emulation_folder, i, workers=3)[0] for i in (side, end)]
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name
    kernels = EmulatedKernels(Variant(0, 16), emulation_folder, 3)
    u = end["u"].requires_grad_()
    y, _ = fused_scan(kernels, Arguments(**end))
    (du,) = torch.autograd.grad(y.sin().sum(), u)
    assert y.stride() == du.stride() == u.stride()


@needs_compiler
@pytest.mark.parametrize(
    ("step", "rate"), [(1e3, 1e3), (1e3, 1e-3), (1e-12, 1e3), (1e-12, 1e-12), (1.0, 100.0)]
)
def test_emulated_kernels_at_extreme_steps_and_rates(emulation_folder, step, rate):
    inputs = to(extreme(make_inputs(67, 1, 40), step, rate), torch.float32)
    actual, _ = emulate(emulation_folder, inputs, workers=1, softplus=False)
    assert_near(actual, expected_of(inputs, delta_softplus=False), FP32)


@needs_compiler
def test_layouts_agree(emulation_folder):
    """The structures and sizes in Python are those of the kernels."""
    structures = {
        "scan_forward": ForwardArguments,
        "combine_segments": CombineArguments,
        "scan_backward": BackwardArguments,
        "reduce_projections": ReduceArguments,
    }
    for variant in (
        Variant(0, 16),
        Variant(0, 16, chunk=16),
        Variant(0, 32),
        Variant(0, 8),
    ):
        library = emulated_kernels.build(variant, emulation_folder)
        for kernel, structure in structures.items():
            size = getattr(library, f"size_of_arguments_{kernel}")()
            assert size == ctypes.sizeof(structure), kernel
        assert library.forward_shared_bytes() == variant.shared_bytes("scan_forward")
        assert library.backward_shared_bytes() == variant.shared_bytes("scan_backward")


def test_two_blocks_share_a_multiprocessor_of_hopper():
    assert 2 * (Variant(2, 16).shared_bytes("scan_backward") + 1024) <= 228 * 1024


@settings(max_examples=300)
@given(
    length=st.integers(1, 3000) | st.integers(1, 2**20),
    batch=st.integers(1, 40),
    channels=st.integers(1, 700) | st.sampled_from([3072, 4608]),
    workers=st.integers(1, 300),
    split_below=st.floats(0, 1),
)
def test_division_covers_all_chunks(length, batch, channels, workers, split_below):
    plan, blocks = divide(length, batch, channels, 32, workers, split_below)
    jobs = plan.batch * plan.channel_blocks * plan.segments
    assert 1 <= blocks <= min(workers, jobs)
    assert plan.segments * plan.segment_chunks >= plan.chunks == -(-length // 32)
    assert (plan.segments - 1) * plan.segment_chunks < plan.chunks  # no segment is empty
    assert plan.worker_chunks >= plan.segment_chunks  # a job is cut at most once
    assert blocks * plan.worker_chunks >= jobs * plan.segment_chunks


# Compiling


def _has_nvrtc() -> bool:
    try:
        compiler.nvrtc()
    except OSError:
        return False
    return True


needs_nvrtc = pytest.mark.skipif(not _has_nvrtc(), reason="needs NVRTC, which CUDA's torch has")


@needs_nvrtc
@pytest.mark.parametrize("element", [0, 1, 2])
def test_kernels_compile_without_spills_in_their_loops(element):
    """The backward's few spills are constants of a piece; the others have none."""
    variant = Variant(element, 16)
    options = ["--gpu-architecture=sm_90", "--ptxas-options=-v", *variant.options()]
    code, messages = compiler.compile_source(kernel_source(), options)
    assert code
    spilled: dict[str, int] = {}
    kernel = ""
    for line in messages.splitlines():
        words = line.split()
        if "Function properties for" in line:
            kernel = words[-1]
        elif "spill stores" in line:
            spilled[kernel] = int(words[words.index("spill") - 2])
    assert spilled.pop("scan_backward") <= 256
    assert spilled and not any(spilled.values())


@needs_nvrtc
def test_a_mistake_is_reported_with_its_place():
    with pytest.raises(RuntimeError, match="kernels.cu"):
        compiler.compile_source("__global__ void f() { nonsense; }", [])


@needs_nvrtc
def test_processes_that_start_together_compile_once(tmp_path):
    program = (
        "from samba_megatron.ops.selective_scan.fused.compiler import compiled\n"
        "code = compiled('extern \"C\" __global__ void f() {}',"
        " ['--gpu-architecture=sm_90'], 'a kernel')\n"
        "print(len(code))"
    )
    environment = os.environ | {compiler.CACHE_VARIABLE: str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert len({out for out, _ in outputs}) == 1
    assert sum("compiling a kernel" in err for _, err in outputs) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".cubin", ".lock"]
