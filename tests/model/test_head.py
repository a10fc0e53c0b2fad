"""The head with the loss in it: against fp64 written out, over layouts; and inside the model."""

import json
from collections.abc import Iterator

import pytest
import torch

from samba_megatron.config import KernelsConfig, ModelConfig, ParallelConfig, RunConfig
from samba_megatron.model.head import SummedLosses
from samba_megatron.model.samba import build_model
from samba_megatron.platform import distributed
from tests.ranks import run_ranks


@pytest.mark.timeout(200)
def test_every_layout_is_the_whole() -> None:
    """Sum, losses and both gradients, TP 1 and 2, with and without sequence parallelism."""
    said = run_ranks("tests.model.head_ranks", 2, timeout=180)
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["layout"] for line in lines] == [[1, False], [2, False], [2, True]]
    assert all(line["cases"] >= 10 for line in lines)


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    """A world of one."""
    distributed.initialize(ParallelConfig())
    yield
    distributed.shutdown()


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_same(world: None, tied: bool) -> None:
    """Parameters by name, losses and all gradients, against megatron's head and loss in fp32."""
    runs = {}
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(32).view(2, 16) % 3 > 0).float()
    for name in ("megatron", "chunked"):
        model = ModelConfig(
            "M-*-",
            hidden_size=32,
            ffn_hidden_size=48,
            num_attention_heads=4,
            vocab_size=64,
            share_embeddings_and_output_weights=tied,
        )
        kernels = KernelsConfig(cross_entropy=name)
        (chunk,) = build_model(RunConfig(model=model, kernels=kernels), "local")
        losses = chunk(tokens, None, None, labels=tokens, loss_mask=mask)
        total = losses.total if name == "chunked" else (losses * mask).sum()
        total.backward()
        with torch.no_grad():
            evaluated = chunk(tokens, None, None, labels=tokens, loss_mask=mask)
        assert isinstance(evaluated, SummedLosses) == (name == "chunked")
        each = losses.each if name == "chunked" else losses.detach()
        gradients = {key: parameter.grad for key, parameter in chunk.named_parameters()}
        runs[name] = {"": each, "logits": chunk(tokens, None, None), **gradients}
    assert runs["chunked"].keys() == runs["megatron"].keys()
    for name, expected in runs["megatron"].items():
        error = (runs["chunked"][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), name
