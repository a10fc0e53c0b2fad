"""The split with the rotary embedding in the model: megatron's losses and gradients."""

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig

from samba_megatron.config import KernelsConfig, ModelConfig, ParallelConfig
from samba_megatron.model.rotary import splits_and_rotates
from samba_megatron.ops.rotary import split_and_rotate
from samba_megatron.ops.rotary.dispatch import ROTARY
from samba_megatron.platform import distributed
from tests.model.documents_ranks import FULL, SELECTIVE, layout
from tests.model.rotating import differences, step


@pytest.fixture(scope="module", autouse=True)
def world():
    """Ends what the tests began."""
    yield
    distributed.shutdown()


@pytest.mark.parametrize(
    ("parallel", "apart", "model"),
    [
        ({}, False, {}),
        (FULL, True, {"num_query_groups": 1}),
        (SELECTIVE, True, {"num_query_groups": None}),
        ({}, False, {"kv_channels": 6}),
    ],
    ids=["one document", "one group, recomputed", "no groups, recomputed parts", "width"],
)
def test_losses_and_gradients_are_megatrons(
    parallel: dict[str, Any], apart: bool, model: dict[str, Any]
) -> None:
    """In fp32, of every parameter; several processes are in test_documents.py."""
    found = differences(ParallelConfig(**parallel), apart, **model)
    assert len(found) > 40
    assert max(found.values()) <= 1e-6, found


def test_a_rotation_is_megatrons() -> None:
    """In fp64, near position a million: results, and the projection's gradient."""
    heads, groups, head_dim = 6, 2, 10
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, groups, (heads // groups + 2) * head_dim)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    rates = 1e4 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(2**20 - 3, 2**20), rates).repeat(1, 2)[:, None, None]
    config = TransformerConfig(num_layers=1, hidden_size=60, num_attention_heads=heads)

    q, k, v = qkv.split([heads // groups * head_dim, head_dim, head_dim], dim=-1)
    with layout(ParallelConfig()):
        theirs = [
            *(apply_rotary_pos_emb(x.reshape(3, 2, -1, head_dim), angles, config) for x in (q, k)),
            v,
        ]
    ours = split_and_rotate(qkv, angles, heads, groups, backend="torch")
    cotangents = [torch.randn(y.shape, generator=generator).double() for y in ours]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    gradients = [torch.autograd.grad(outputs, qkv, cotangents)[0] for outputs in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


def test_where_megatron_rotates() -> None:
    """By default; where something comes between the split and the rotation; and without any."""
    model = ModelConfig(num_attention_heads=4, num_query_groups=2)
    assert splits_and_rotates(model, KernelsConfig(rotary="triton"), 2)
    assert not splits_and_rotates(model, KernelsConfig(rotary="triton"), 4)
    for kernels in (KernelsConfig(), KernelsConfig(rotary="megatron")):
        assert not splits_and_rotates(model, kernels, 1)
    ROTARY.last_backend = None
    with layout(ParallelConfig()):
        step("torch", ParallelConfig(), False, position_embedding_type="none")
    assert ROTARY.last_backend is None


def test_a_short_convolution_comes_before_the_rotation() -> None:
    model = ModelConfig(num_attention_heads=4, short_convolution=True)
    assert not splits_and_rotates(model, KernelsConfig(rotary="triton"), 1)
