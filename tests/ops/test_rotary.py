"""The split with the rotary embedding: the kernel against the formula, far along a sequence too."""

import importlib
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from samba_megatron.ops.cost import rotary_work
from samba_megatron.ops.rotary import split_and_rotate, split_and_rotate_reference, triton_rotary
from samba_megatron.ops.rotary.dispatch import ROTARY
from samba_megatron.platform.errors import UserError
from tests.ops.comparing import Kernel, assert_near, assert_same_bits
from tests.ops.interpreting import interpret

FAR = 2**20 - 3
"""A first position whose angles a sine must reduce before it looks at them."""
LAYOUTS = ("contiguous", "batch first", "part of a wider", "every second")
"""Of gradients in memory."""


@dataclass(frozen=True)
class Sizes:
    """Of one call."""

    length: int
    batch: int
    heads: int
    groups: int
    head_dim: int
    first: int = 0
    layouts: tuple[str, str, str] = ("contiguous",) * 3

    def angles(self) -> Tensor:
        """fp32 [s, 1, 1, hd], as the model's: products of position and rate."""
        rates = 10000.0 ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        positions = torch.arange(self.first, self.first + self.length)
        return torch.outer(positions, rates).repeat(1, 2)[:, None, None]

    def qkv(self) -> Tensor:
        """fp64."""
        width = (self.heads // self.groups + 2) * self.head_dim
        return normal(1, self.length, self.batch, self.groups, width)

    def gradients(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Of q, k and v, in the layouts."""
        numbers = (self.heads, self.groups, self.groups)
        return [
            laid(normal(2 + i, self.length, self.batch, n, self.head_dim).to(device, dtype), layout)
            for i, (n, layout) in enumerate(zip(numbers, self.layouts, strict=True))
        ]


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def laid(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "batch first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "part of a wider":
        return torch.cat([x, x], dim=2)[:, :, : x.shape[2]]
    return x.repeat_interleave(2, dim=-1)[..., ::2] if layout == "every second" else x


def drawn() -> st.SearchStrategy[Sizes]:
    """Any numbers of heads and groups, and heads of any even width."""
    count, few, layout = st.integers(1, 3), st.integers(1, 2), st.sampled_from(LAYOUTS)
    return st.builds(
        lambda groups, queries, **rest: Sizes(heads=groups * queries, groups=groups, **rest),
        groups=count,
        queries=count,
        length=few,
        batch=few,
        head_dim=st.integers(1, 9).map(lambda pairs: 2 * pairs),
        first=st.sampled_from([0, FAR]),
        layouts=st.tuples(layout, layout, layout),
    )


def passes(function, sizes: Sizes, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """q, k, v and the projection's gradient; all inputs rounded to ``dtype`` but the angles."""
    qkv = sizes.qkv().to(device, dtype).requires_grad_()
    outputs = function(qkv, sizes.angles().to(device), sizes.heads, sizes.groups)
    (gradient,) = torch.autograd.grad(outputs, qkv, sizes.gradients(dtype, device))
    found = dict(zip(("q", "k", "v"), outputs, strict=True))
    assert all(x.is_contiguous() for x in outputs)
    return {name: x.detach().cpu() for name, x in found.items()} | {"dqkv": gradient.cpu()}


def exact(sizes: Sizes, dtype: torch.dtype) -> dict[str, Tensor]:
    """In fp64, of inputs that are rounded to ``dtype``."""
    qkv = sizes.qkv().to(dtype).double().requires_grad_()
    outputs = split_and_rotate_reference(qkv, sizes.angles(), sizes.heads, sizes.groups)
    gradients = [gradient.double() for gradient in sizes.gradients(dtype)]
    (dqkv,) = torch.autograd.grad(outputs, qkv, gradients)
    found = dict(zip(("q", "k", "v"), outputs, strict=True))
    return {name: x.detach() for name, x in found.items()} | {"dqkv": dqkv}


def assert_rounded_once(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each number in half precision within half a unit in its last place of the exact one, but for
    what fp32 leaves open before."""
    for name, want in expected.items():
        unit, error = torch.finfo(actual[name].dtype).eps, (actual[name].double() - want).abs()
        allowed = unit / 2 * want.abs() + 1e-6 * want.abs().max()
        assert bool((error <= allowed).all()), name


def compare() -> None:
    """Compares the kernels in Triton's interpreter, which runs them on CPU tensors."""
    kernel = triton_rotary.split_and_rotate_triton

    @settings(max_examples=15, deadline=None, derandomize=True, database=None)
    @given(drawn())
    def hold(sizes: Sizes) -> None:
        got = passes(kernel, sizes, torch.float32)
        assert_near(got, exact(sizes, torch.float32), 1e-6)

    hold()
    several_blocks, half = Sizes(2, 2, 15, 5, 128, FAR), torch.float16  # Triton cuts bf16 off here
    got = passes(kernel, several_blocks, half)
    assert_rounded_once(got, exact(several_blocks, half))
    assert_same_bits({"v": got["v"]}, {"v": exact(several_blocks, half)["v"].to(half)})
    assert passes(kernel, Sizes(0, 2, 4, 2, 8), torch.float32)["dqkv"].numel() == 0
    with FlopCounterMode(display=False) as counter:
        passes(kernel, Sizes(3, 2, 6, 3, 8), torch.float32)
    work = rotary_work(3 * 2, 6, 3, 8, 4)
    assert counter.get_total_flops() == work.forward.flops + work.backward.flops


def _call(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int, int]:
    return sizes.qkv().to(dtype), sizes.angles(), sizes.heads, sizes.groups


def check_operators() -> None:
    """Schema, fake tensors and gradients, by torch's own check; and no second derivative.

    For another test's process, which has the compiler already (see test_fused_operator.py).
    """
    qkv, angles, heads, groups = _call(Sizes(3, 2, 4, 2, 6))
    operators = torch.ops.samba_megatron
    torch.library.opcheck(operators.split_and_rotate, (qkv.requires_grad_(), angles, heads, groups))
    gradients = Sizes(3, 2, 4, 2, 6, 0, LAYOUTS[1:]).gradients(torch.float32)
    torch.library.opcheck(operators.split_and_rotate_backward, (*gradients, angles))
    q, k, v = triton_rotary.split_and_rotate_triton(qkv, angles, heads, groups)
    loss = (q**2).sum() + k.sum() + v.sum()
    (gradient,) = torch.autograd.grad(loss, qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


def test_the_kernel_is_the_formula() -> None:
    interpret("tests.ops.test_rotary")


def test_the_reference_is_a_rotation_by_the_position() -> None:
    """By hand: complex numbers times e^(i·angle); a head of two numbers, three positions."""
    qkv, angles = normal(1, 3, 1, 1, 6), torch.tensor([0.0, 1.0, 2.0]).double()
    q, k, v = split_and_rotate(qkv, angles.repeat(2, 1).t()[:, None, None], 1, 1, backend="torch")
    turned = torch.view_as_complex(qkv.view(3, 3, 2)) * torch.polar(angles * 0 + 1, angles)[:, None]
    assert torch.allclose(torch.view_as_complex(q[:, 0, 0]), turned[:, 0], atol=1e-15)
    assert torch.allclose(torch.view_as_complex(k[:, 0, 0]), turned[:, 1], atol=1e-15)
    assert torch.equal(v[:, 0, 0], qkv[:, 0, 0, 4:])


def test_gradients_of_the_reference() -> None:
    sizes = Sizes(3, 2, 4, 2, 4, FAR)
    qkv, angles = sizes.qkv().requires_grad_(), sizes.angles().double()
    assert torch.autograd.gradcheck(
        lambda x: split_and_rotate_reference(x, angles, sizes.heads, sizes.groups), (qkv,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1024, 2, 18, 18, 128),
        Sizes(1000, 2, 12, 4, 128, FAR - 1000, ("batch first", "part of a wider", "every second")),
        Sizes(300, 3, 5, 1, 80, FAR - 300),
        Sizes(7, 1, 6, 3, 6, FAR),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_the_kernel_on_a_gpu(sizes: Sizes, dtype: torch.dtype) -> None:
    Kernel("triton", "cuda", dtype, 0).require(ROTARY)

    kernel = partial(split_and_rotate, backend="triton")
    got, expected = passes(kernel, sizes, dtype, "cuda"), exact(sizes, dtype)
    assert_same_bits(passes(kernel, sizes, dtype, "cuda"), got)
    if dtype is torch.float32:
        assert_near(got, expected, 1e-6)
    else:
        assert_rounded_once(got, expected)


@pytest.mark.gpu
def test_it_is_as_exact_as_transformer_engines() -> None:
    """In bf16, of queries and keys far along a sequence, forward and backward."""
    Kernel("triton", "cuda", torch.bfloat16, 0).require(ROTARY)
    pytest.importorskip("transformer_engine")
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")
    sizes = Sizes(2048, 2, 12, 4, 128, FAR - 2048)

    def theirs(qkv: Tensor, angles: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
        slots = qkv.unflatten(-1, (heads // groups + 2, -1))
        q, k, v = slots.split([heads // groups, 1, 1], dim=-2)
        q, k = (
            rope.apply_rotary_pos_emb(x.flatten(2, 3), angles, tensor_format="sbhd", fused=True)
            for x in (q, k)
        )
        return q.contiguous(), k.contiguous(), v.squeeze(-2).contiguous()

    def errors(function) -> dict[str, float]:
        found = passes(function, sizes, torch.bfloat16, "cuda")
        return {name: float((found[name].double() - want).abs().max()) for name, want in expected}

    expected = list(exact(sizes, torch.bfloat16).items())
    ours = errors(partial(split_and_rotate, backend="triton"))
    for name, error in errors(theirs).items():
        print(f"{name}: ours off by {ours[name]:.2e}, Transformer Engine's by {error:.2e}")
        assert ours[name] <= 1.01 * error, name


@pytest.mark.parametrize(
    ("shape", "angles", "heads", "says"),
    [
        ((4, 2, 2, 24), (4, 1, 1, 6), 3, r"qkv must be \[s, b, 2, \(3 / 2 \+ 2\)"),
        ((4, 2, 48), (4, 1, 1, 6), 4, "not \\[4, 2, 48\\]"),
        ((4, 2, 2, 20), (4, 1, 1, 5), 4, "with an even hd"),
        ((4, 2, 2, 24), (4, 1, 1, 4), 4, r"angles must be \[4, 1, 1, 6\], not \[4, 1, 1, 4\]"),
        ((4, 2, 2, 24), (3, 1, 1, 6), 4, "angles must be"),
    ],
)
def test_other_shapes_are_refused(shape, angles, heads, says) -> None:
    with pytest.raises(ValueError, match=says):
        split_and_rotate(torch.zeros(shape), torch.zeros(angles), heads, 2)


def test_the_kernel_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(UserError, match="'triton' cannot run here: it runs on cuda.*use auto or"):
        split_and_rotate(*_call(Sizes(2, 1, 2, 1, 4)), backend="triton")
