"""Head and loss in chunks: against all logits at once, on a CPU, interpreted, and on a GPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.ops.cost import LOGITS_BYTES, chunk_tokens
from samba_megatron.ops.linear_cross_entropy import linear_cross_entropy, triton_softmax
from samba_megatron.ops.linear_cross_entropy.chunked import Softmax, chunked
from samba_megatron.ops.linear_cross_entropy.dispatch import LINEAR_CROSS_ENTROPY
from samba_megatron.ops.linear_cross_entropy.torch_softmax import statistics
from tests.ops.comparing import Inputs, Kernel, assert_near
from tests.ops.interpreting import interpret


def make_inputs(
    shape: tuple[int, ...], width: int, vocabulary: int, seed: int = 0, scale: float = 1.0
) -> Inputs:
    """fp64; about a fifth of the tokens ignored, a fifth counting nothing, the others 0 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def chance(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(0, vocabulary, shape, generator=generator)
    return {
        "hidden": torch.randn(*shape, width, generator=generator, dtype=torch.float64) * scale,
        "weight": torch.randn(vocabulary, width, generator=generator, dtype=torch.float64),
        "target": target.masked_fill(chance(shape) < 0.2, -100),
        "loss_weights": chance(shape).masked_fill(chance(shape) < 0.2, 0.0),
    }


def run(inputs: Inputs, factor: float = 1.7, **options: Any) -> Inputs:
    """Sum, losses and gradients; the sum's own gradient is ``factor``."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("hidden", "weight")}
    total, losses = linear_cross_entropy(**{**inputs, **leaves}, **options)
    total.backward(torch.full_like(total, factor))
    gradients = {f"d{name}": leaf.grad for name, leaf in leaves.items()}
    return {"total": total.detach(), "losses": losses, **gradients}


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 3)),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 40),
    chunk=st.integers(1, 25),
    scale=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 2**30),
)
def test_chunks_are_the_whole(shape, width, vocabulary, chunk, scale, seed):
    """Sizes, chunks, masks, ignored tokens, softmaxes from uniform to a single one."""
    inputs = make_inputs(shape, width, vocabulary, seed, scale)
    expected = run(inputs, backend="reference")
    # Of a sum or gradient that cancels, the scale is that of its terms.
    assert_near(run(inputs, chunk=chunk, backend="torch"), expected, 1e-12, least_scale=1.0)


def test_half_precision_rounds_operands_only():
    """bf16 logits and products on a CPU; the weight's gradient is rounded once."""
    inputs = {
        name: tensor.to(torch.bfloat16) if name in ("hidden", "weight") else tensor
        for name, tensor in make_inputs((6, 3), 8, 50).items()
    }
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    got = run(inputs, chunk=5, backend="torch")
    assert got["total"].dtype == got["losses"].dtype == torch.float32
    assert_near(got, run(wide, backend="reference"), 2e-2)


def test_without_gradients_none_are_made():
    def fails(*arguments: Tensor) -> None:
        raise AssertionError("made a gradient that nobody wants")

    run_chunked = chunked(Softmax(statistics, fails))
    inputs = make_inputs((9,), 4, 11)
    expected, _ = linear_cross_entropy(**inputs, backend="reference")
    assert run_chunked(*inputs.values())[0] == pytest.approx(expected.item(), rel=1e-12)
    inputs["weight"].requires_grad_()
    with torch.no_grad():
        run_chunked(*inputs.values())
    with pytest.raises(AssertionError, match="nobody wants"):
        run_chunked(*inputs.values())


def test_only_the_sum_is_differentiated_and_only_once():
    inputs = make_inputs((5,), 4, 11)
    inputs["hidden"].requires_grad_()
    total, losses = linear_cross_entropy(**inputs, chunk=2)
    assert not losses.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses.sum().backward()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="were handed over"):
        total.backward()


def test_a_frozen_side_gets_no_gradient():
    inputs = make_inputs((5,), 4, 11)
    both = run(inputs)
    for name in ("hidden", "weight"):
        leaf = inputs[name].clone().requires_grad_()
        linear_cross_entropy(**{**inputs, name: leaf}, chunk=2)[0].backward()
        assert torch.allclose(leaf.grad * 1.7, both[f"d{name}"], rtol=1e-12)


@pytest.mark.parametrize("buffer", [torch.float64, torch.float32])
def test_the_gradient_buffer_is_added_to(buffer):
    """As megatron's hook expects it: what was there stays, and autograd's own part is zero."""
    inputs = make_inputs((5, 2), 4, 11)
    expected = run(inputs, factor=1.0)["dweight"]
    weight: Any = inputs["weight"].requires_grad_()
    weight.main_grad = torch.ones_like(weight, dtype=buffer)
    for _ in range(2):
        linear_cross_entropy(**inputs, into_main_grad=True, chunk=3)[0].backward()
    assert weight.grad_added_to_main_grad
    assert not weight.grad.any()
    assert_near({"": weight.main_grad}, {"": 1 + 2 * expected}, 1e-6)


def test_what_does_not_fit_is_seen():
    inputs = make_inputs((5,), 4, 11)
    inputs["target"][3] = 11
    for backend in ("torch", "reference"):
        total, losses = linear_cross_entropy(**inputs, backend=backend)
        assert losses.isnan().tolist() == [False, False, False, True, False]
        assert total.isnan()
    with pytest.raises(ValueError, match=r"weight \[V, d\]"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"][:, :3], inputs["target"])
    with pytest.raises(ValueError, match=r"target must be \[5\]"):
        linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["target"][:4])


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [
        (32768, 32000, 4096),
        (32768, 128256, 1024),
        (5000, 32000, 2560),
        (100, 32000, 100),
        (0, 7, 1),
    ],
)
def test_chunks_are_bounded_and_alike(tokens, vocabulary, chunk):
    """Tokens of a bf16 chunk by hand; a large vocabulary has as many as a product needs."""
    assert chunk_tokens(tokens, vocabulary, 2) == chunk
    assert chunk * vocabulary * 2 <= LOGITS_BYTES or chunk == 1024


def compare() -> None:
    """Compares the kernels in Triton's interpreter, which runs them on CPU tensors."""
    run_chunked = chunked(triton_softmax.make_softmax(triton_softmax.make_kernels()))
    for vocabulary in (3, triton_softmax.BLOCK + 5):
        inputs = make_inputs((5,), 4, vocabulary, scale=3.0)
        expected = run(inputs, factor=1.0, backend="reference")
        narrow = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
        hidden, weight = (narrow[name].requires_grad_() for name in ("hidden", "weight"))
        total, losses = run_chunked(**narrow, chunk=3)
        total.backward()
        got = {"total": total.detach(), "losses": losses, "dhidden": hidden.grad}
        assert_near({**got, "dweight": weight.grad}, expected, 1e-5)


def test_the_kernels_are_the_formula() -> None:
    interpret("tests.ops.test_linear_cross_entropy")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, backend: str) -> None:
    """Three chunks, the last one short, and a vocabulary that fills no block."""
    Kernel(backend, "cuda", dtype, 0).require(LINEAR_CROSS_ENTROPY)
    inputs = {name: tensor.cuda() for name, tensor in make_inputs((500, 2), 256, 5003).items()}
    for name, scale in {"hidden": 1.0, "weight": 256**-0.5}.items():
        inputs[name] = (inputs[name] * scale).to(dtype)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    tolerance = 2e-2 if dtype is torch.bfloat16 else 2e-5
    got = run(inputs, chunk=384, backend=backend)
    assert_near(got, run(wide, backend="reference"), tolerance)


@pytest.mark.gpu
def test_memory_on_a_gpu() -> None:
    """8192 tokens of a vocabulary of 32,000: above its inputs and results, the chunked one needs a
    chunk of logits and the weight's gradient in fp32; the plain one several times all logits."""
    Kernel("triton", "cuda", torch.bfloat16, 0).require(LINEAR_CROSS_ENTROPY)
    tokens, width, vocabulary = 8192, 512, 32000
    inputs = {
        "hidden": torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16),
        "weight": torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * 0.02,
        "target": torch.randint(0, vocabulary, (tokens,), device="cuda"),
    }

    def peak(backend: str) -> int:
        run(inputs, backend=backend)  # compiles the kernels, and has cuBLAS take its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs, backend=backend)
        return torch.cuda.max_memory_allocated() - before

    logits = 2 * tokens * vocabulary
    chunk = 2 * vocabulary * chunk_tokens(tokens, vocabulary, 2)
    gradients = 2 * tokens * width + (4 + 2) * vocabulary * width
    assert chunk < logits
    assert peak("triton") < chunk + gradients + (16 << 20)
    assert peak("reference") > 3 * logits
