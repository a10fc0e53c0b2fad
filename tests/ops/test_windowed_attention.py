"""Windowed attention's backends against its reference, and the reference against a loop."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from samba_megatron.ops.registry import Request
from samba_megatron.ops.windowed_attention import torch_attention, windowed_attention
from samba_megatron.ops.windowed_attention.dispatch import WINDOWED_ATTENTION
from samba_megatron.ops.windowed_attention.flash_attn import attend_packed
from samba_megatron.ops.windowed_attention.packing import (
    in_rows,
    lay_end_to_end,
    pack_documents,
    put_side_by_side,
)
from samba_megatron.ops.windowed_attention.reference import windowed_attention_reference
from samba_megatron.platform.errors import UserError
from tests.ops.comparing import Inputs, Kernel, assert_near, assert_same_bits, run, to

BLOCK = torch_attention.MIN_QUERY_BLOCK
KERNELS = [
    Kernel("torch", "cpu", torch.float64, 1e-13).param(),
    Kernel("torch", "cuda", torch.float64, 1e-13).param(),
    Kernel("flash_attn", "cuda", torch.bfloat16, 2e-2).param(),
]


def make_inputs(
    length: int,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    halo: int = 0,
    seed: int = 0,
) -> Inputs:
    """q, k and v in fp64; the keys have `halo` positions before the queries'."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "q": normal(length, batch, heads, head_dim),
        "k": normal(length + halo, batch, kv_heads, head_dim),
        "v": normal(length + halo, batch, kv_heads, head_dim),
        "reset": None,
    }


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("document_start", [0, 1, 5])
def test_reference_attends_to_the_window_latest_keys_of_its_group(window, document_start):
    q, k, v, _ = make_inputs(6, batch=1, halo=2).values()
    reset = torch.zeros(8, 1, dtype=torch.bool)
    reset[document_start] = True
    y = windowed_attention_reference(q, k, v, window, reset=reset).view(6, 4, 8)
    for t in range(6):
        for head in range(4):
            last = t + 2
            first = 0 if window is None else max(0, last - window + 1)
            first = max(first, document_start) if last >= document_start else first
            keys, values = (x[first : last + 1, 0, head // 2] for x in (k, v))
            weights = torch.softmax(keys @ q[t, 0, head] / math.sqrt(8), dim=0)
            torch.testing.assert_close(y[t, head], weights @ values, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=30, derandomize=True)
@given(
    length=st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]) | st.integers(1, 300),
    halo=st.sampled_from([0, 0, 1, 40, BLOCK, 200]),
    window=st.sampled_from([None, 1, 2, BLOCK, BLOCK + 1, 10**6]) | st.integers(1, 300),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1), (1, 1)]),
    documents=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_matches_reference(kernel, length, halo, window, heads, documents, seed):
    head_dim = 64 if kernel.backend == "flash_attn" else 8
    inputs = make_inputs(length, 2, heads[0], heads[1], head_dim=head_dim, halo=halo, seed=seed)
    if documents:
        random = torch.Generator().manual_seed(seed)
        inputs["reset"] = torch.rand(length + halo, 2, generator=random) < 0.02
    kernel.require(WINDOWED_ATTENTION)
    inputs = to(to(inputs, kernel.device, kernel.dtype), torch.float64)
    actual = run(
        windowed_attention, to(inputs, kernel.dtype), window=window, backend=kernel.backend
    )
    expected = run(windowed_attention_reference, inputs, window=window)
    # a single key's weight is 1 whatever the score: gradients that are exactly zero
    assert_near(actual, expected, kernel.tolerance, least_scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("part", [slice(0, 16), slice(16, 32), slice(3, 19), slice(0, 5)])
def test_sequences_end_to_end_and_back(dtype, part):
    """Parts of one projection, which do or do not divide into wide elements."""
    whole = torch.randn(6, 2, 3, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = whole[..., part]

    def there_and_back(x: Tensor) -> Tensor:
        packed = lay_end_to_end(x)
        assert torch.equal(packed[6:], x[:, 1])
        return in_rows(put_side_by_side(packed, 2))

    assert_same_bits(run(there_and_back, {"x": x}), run(lambda x: x.flatten(2), {"x": x}))


def test_what_lies_end_to_end_is_not_copied():
    """Nor is its gradient: as a model has its sequences whose documents stay apart."""
    row = torch.randn(12, 1, 3, 32, requires_grad=True)
    side_by_side = row.unflatten(0, (2, 6)).squeeze(2).transpose(0, 1)
    packed = lay_end_to_end(side_by_side)
    assert packed.data_ptr() == row.data_ptr()
    gradient = torch.randn(12, 3, 32)
    (found,) = torch.autograd.grad(packed, row, gradient)
    assert found.data_ptr() == gradient.data_ptr() and torch.equal(found[:, 0], gradient)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 40, 256])
def test_transformer_engine_inside_documents(window):
    kernel = Kernel("transformer_engine", "cuda", torch.bfloat16, 2e-2)
    kernel.require(WINDOWED_ATTENTION)
    inputs = make_inputs(256, 2, 4, 2, head_dim=64)
    for seed in range(3):
        random = torch.Generator().manual_seed(seed)
        inputs["reset"] = torch.rand(256, 2, generator=random) < 0.02
        rounded = to(to(inputs, "cuda", kernel.dtype), torch.float64)
        actual = run(
            windowed_attention, to(rounded, kernel.dtype), window=window, backend=kernel.backend
        )
        expected = run(windowed_attention_reference, rounded, window=window)
        assert_near(actual, expected, kernel.tolerance, least_scale=1.0)


@pytest.mark.parametrize("window", [None, 5])
def test_scale_and_strided_projections(window):
    """q, k and v as they lie after a fused projection, scores scaled by hand."""
    inputs = make_inputs(2 * BLOCK + 3)
    fused = torch.cat([x.reshape(*x.shape[:2], 2, -1) for x in list(inputs.values())[:3]], dim=-1)
    q, k, v = fused.split([16, 8, 8], dim=-1)
    strided = {"q": q.reshape(*q.shape[:2], 4, 8), "k": k, "v": v}
    expected = run(windowed_attention_reference, inputs, window=window, scale=0.3)
    actual = run(windowed_attention, strided, window=window, scale=0.3, backend="torch")
    assert_near(actual, expected, 1e-13)


@pytest.mark.parametrize("start", [1, BLOCK - 1, BLOCK, BLOCK + 30])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_cannot_touch_each_other(start, window, dtype):
    """Another first document leaves the second's outputs and gradients the same bits, and v.v."""
    length = 2 * BLOCK + 5
    inputs = to(make_inputs(length), dtype)
    inputs["reset"] = torch.zeros(length, 2, dtype=torch.bool)
    inputs["reset"][start] = True
    base = run(windowed_attention, inputs, window=window, backend="torch")
    first, second = slice(0, start), slice(start, None)
    for changed, other in ((first, second), (second, first)):
        perturbed = inputs | {name: inputs[name].clone() for name in "qkv"}
        for name in "qkv":
            perturbed[name][changed] *= -3
        result = run(windowed_attention, perturbed, window=window, backend="torch")
        assert not torch.equal(result["out0"][changed], base["out0"][changed])
        for name in ("out0", "dq", "dk", "dv"):
            assert torch.equal(result[name][other], base[name][other]), name


def varlen_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """What flash_attn_varlen_func computes, a sequence at a time: queries meet the last keys."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    assert max_seqlen_q == cu_seqlens_q.diff().max() and max_seqlen_k == cu_seqlens_k.diff().max()
    window = None if window_size[0] < 0 else window_size[0] + 1
    outputs = []
    spans = zip(*(x.unfold(0, 2, 1).tolist() for x in (cu_seqlens_q, cu_seqlens_k)), strict=True)
    for (first, last), (first_key, last_key) in spans:
        if last > first:
            keys, values = (x[first_key:last_key, None] for x in (k, v))
            queries = q[first:last, None]
            y = windowed_attention_reference(queries, keys, values, window, softmax_scale)
            outputs.append(y.view(last - first, *q.shape[1:]))
    return torch.cat(outputs)


@settings(max_examples=60)
@given(
    length=st.integers(1, 40),
    halo=st.sampled_from([0, 0, 1, 9]),
    window=st.sampled_from([None, 1, 7]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_documents_end_to_end_are_the_documents(length, halo, window, density, seed):
    """The packing for kernels of several lengths, around a plain one: masks never come into it."""
    inputs = make_inputs(length, batch=3, halo=halo, seed=seed)
    random = torch.Generator().manual_seed(seed)
    inputs["reset"] = torch.rand(length + halo, 3, generator=random) < density

    def packed(q: Tensor, k: Tensor, v: Tensor, reset: Tensor) -> Tensor:
        options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True}
        options["window_size"] = (-1, -1) if window is None else (window - 1, 0)
        return attend_packed(varlen_kernel, q, k, v, pack_documents(reset, length), options)

    expected = run(windowed_attention_reference, inputs, window=window, scale=0.3)
    assert_near(run(packed, inputs), expected, 1e-12, least_scale=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("halo", [0, 100])
@pytest.mark.parametrize("window", [None, 40])
def test_flash_attn_keeps_documents_apart_to_the_bit(window, halo):
    """As the test before for torch; on a GPU, where sums may go in another order each time."""
    if reason := WINDOWED_ATTENTION.backends["flash_attn"].unavailable():
        pytest.skip(f"flash_attn: {reason}")
    length, start = 700, 333
    inputs = to(make_inputs(length, head_dim=64, halo=halo), "cuda", torch.bfloat16)
    inputs["reset"] = torch.zeros(length + halo, 2, dtype=torch.bool, device="cuda")
    inputs["reset"][start + halo] = True
    perturbed = inputs | {name: inputs[name].clone() for name in "qkv"}
    perturbed["q"][:start] *= -3
    for name in "kv":
        perturbed[name][: start + halo] *= -3
    torch.use_deterministic_algorithms(True)
    try:
        base, result = (
            run(windowed_attention, given, window=window, backend="flash_attn")
            for given in (inputs, perturbed)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, first in (("out0", start), ("dq", start), ("dk", start + halo), ("dv", start + halo)):
        assert not torch.equal(result[name][:first], base[name][:first])
        assert torch.equal(result[name][first:], base[name][first:]), name


@pytest.mark.parametrize("cut", [10, BLOCK, BLOCK + 7])
def test_two_calls_equal_one(cut):
    """The second call's keys bring a halo of window - 1 positions."""
    window = 9
    inputs = make_inputs(2 * BLOCK)

    def in_two(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        halo = cut - window + 1
        first = windowed_attention(q[:cut], k[:cut], v[:cut], **rest)
        return torch.cat([first, windowed_attention(q[cut:], k[halo:], v[halo:], **rest)])

    options: dict[str, Any] = {"window": window, "backend": "torch"}
    expected = run(windowed_attention, inputs, **options)
    assert_near(run(in_two, inputs, **options), expected, 1e-13)


@pytest.mark.parametrize("window", [None, 40])
def test_bf16_is_only_storage(window):
    """bf16 in, bf16 out: the same bits as fp32 arithmetic rounded at the very end."""
    inputs = to(make_inputs(BLOCK + 9, head_dim=32), torch.bfloat16)
    wide = run(
        lambda **t: windowed_attention(**t, window=window).bfloat16(), to(inputs, torch.float32)
    )
    narrow = run(windowed_attention, inputs, window=window)
    assert all(tensor.dtype == torch.bfloat16 for tensor in narrow.values())
    assert_same_bits(narrow, {name: tensor.bfloat16() for name, tensor in wide.items()})


@pytest.mark.parametrize("window", [None, 40])
def test_bits_do_not_depend_on_repetition_batch_or_head_split(window):
    inputs = to(make_inputs(2 * BLOCK + 3, batch=4, head_dim=32), torch.float32)
    q, k, v, _ = inputs.values()
    whole = windowed_attention(q, k, v, window, backend="torch")
    assert torch.equal(windowed_attention(q, k, v, window, backend="torch"), whole)
    by_batch = windowed_attention(q[:, 1:3], k[:, 1:3], v[:, 1:3], window, backend="torch")
    assert torch.equal(by_batch, whole[:, 1:3])
    by_head = windowed_attention(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:], window, backend="torch")
    assert torch.equal(by_head, whole[:, :, 64:])


def test_work_grows_with_the_window_not_the_square():
    """No block sees more keys than its window and two blocks: counted, not timed."""
    seen = []

    def counting(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        seen.append(q.shape[2] * k.shape[2])
        return original(q, k, v, **rest)

    original = torch_attention.scaled_dot_product_attention
    length, window = 16 * BLOCK, BLOCK
    inputs = make_inputs(length, batch=1, heads=1, kv_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_attention, "scaled_dot_product_attention", counting)
        windowed_attention(**inputs, window=window, backend="torch")
    assert len(seen) == 16
    assert sum(seen) <= length * (window + BLOCK)


def test_flash_attn_names_its_limits():
    flash_attn = WINDOWED_ATTENTION.backends["flash_attn"]
    request = Request("cuda", torch.bfloat16, sizes={"head_dim": 512})
    assert flash_attn.refuses(request) == "it takes head dimensions up to 256, not 512"
    with pytest.raises(UserError, match="'flash_attn' cannot run here: it runs on cuda"):
        windowed_attention(**make_inputs(3), backend="flash_attn")


def test_calls_that_make_no_sense_are_refused():
    q, k, v, _ = make_inputs(4).values()
    with pytest.raises(ValueError, match="window must be at least 1, not 0"):
        windowed_attention(q, k, v, window=0)
    with pytest.raises(ValueError, match="2 key heads do not divide 3"):
        windowed_attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="do not fit"):
        windowed_attention(q, k[:3], v[:3])
    with pytest.raises(ValueError, match="reset must be"):
        windowed_attention(q, k, v, reset=torch.zeros(3, 2, dtype=torch.bool))
    packed = pack_documents(torch.zeros(4, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="there is no reset"):
        windowed_attention(q, k, v, packed=packed)
