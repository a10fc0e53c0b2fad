"""On a GPU in bf16 with Transformer Engine: recomputed results free what the planner says."""

import gc
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from megatron.core import tensor_parallel

from samba_megatron.config import ParallelConfig
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.model.samba import build_model
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import layer_bytes
from samba_megatron.platform import distributed
from tests.model.documents_ranks import layout
from tests.model.isolation import VOCABULARY, toy_run
from tests.model.recomputing import ALL, recomputing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {
    "hybrid_layer_pattern": "M-*- x6",
    "hidden_size": 512,
    "ffn_hidden_size": 1408,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "window_size": 256,
    "short_convolution": False,
}
SEQUENCES, LENGTH = 8, 1024


@dataclass
class Step:
    """Of one model from the seed."""

    kept: int
    """Bytes that the forward pass leaves."""
    peak: int
    """Most bytes at any time, over those before the step."""
    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def world():
    """One rank, and what is made once made."""
    with layout(ParallelConfig()):
        for names in ([], ALL):
            step(names)
        yield
    distributed.shutdown()


def configuration(names: list[str]) -> Any:
    """A model of 24 layers."""
    parallel = recomputing(ParallelConfig(), names) if names else ParallelConfig()
    config = toy_run({}, parallel, **SIZES)
    return replace(config, data=replace(config.data, sequence_length=LENGTH))


def step(names: list[str]) -> Step:
    """A forward and a backward pass."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunk: Any = build_model(configuration(names), "transformer_engine")[0]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator).cuda()
    for parameter in chunk.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = chunk(tokens, None, None, labels=tokens)
    kept = torch.cuda.memory_allocated() - before
    losses.sum().backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = {
        name.replace("mixer.in_proj.layer_norm_", "norm.")
        .replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        .replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."): parameter.grad
        for name, parameter in chunk.named_parameters()
    }
    return Step(kept, peak, losses.detach(), gradients)


def planned(names: list[str]) -> float:
    """Bytes that the layers keep."""
    config = configuration(names)
    symbols = layer_symbols(config.model.hybrid_layer_pattern)
    return SEQUENCES * LENGTH * sum(layer_bytes(Layout(config, 1), symbol) for symbol in symbols)


@pytest.mark.parametrize("names", [*([name] for name in ALL), ALL], ids="+".join)
def test_memory_falls_and_losses_stay(names: list[str]) -> None:
    """Kept bytes to 10 % of the planner's; the peak by no more, and by less than a layer less."""
    plain, again = step([]), step(names)
    saved, expected = plain.kept - again.kept, planned([]) - planned(names)
    fallen = plain.peak - again.peak
    worst = float((plain.losses - again.losses).abs().max())
    print(f"{names}: kept {saved / expected:.3f}, peak {fallen / expected:.3f} of planned, {worst}")
    assert saved == pytest.approx(expected, rel=0.1)
    assert 0.8 * expected <= fallen <= 1.1 * expected
    assert worst < 1e-3
    assert plain.gradients.keys() == again.gradients.keys()
    for name, gradient in plain.gradients.items():
        error = float((gradient - again.gradients[name]).float().norm() / gradient.float().norm())
        assert error < 1e-2, name
