"""Numbers that the layers say of themselves, against the real modules and torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samba_megatron.config import ModelConfig, ParallelConfig, RunConfig
from samba_megatron.config.load import parse_run_config
from samba_megatron.model.layers import KINDS
from samba_megatron.model.samba import build_model, count_parameters, flops_per_token
from samba_megatron.platform import distributed

REFERENCE = {
    "samba_421m": 421_793_280,
    "samba_1.3b": 1_330_207_488,
    "samba_1.7b": 1_741_604_864,
    "samba_3.8b": 3_864_275_712,
    "mamba_swa_mlp": 394_999_296,
}


@pytest.fixture(scope="module", autouse=True)
def world():
    """A world of one."""
    distributed.initialize(ParallelConfig())
    yield
    distributed.shutdown()


@pytest.mark.parametrize(("recipe", "parameters"), REFERENCE.items())
def test_parameter_counts_are_the_reference(recipe: str, parameters: int) -> None:
    """The sum over the layers, without a weight."""
    assert count_parameters(parse_run_config(["--config", recipe]).model) == parameters


@pytest.mark.parametrize("recipe", ["samba_421m", "samba_421m_nope", "llama2_438m"])
def test_built_model_has_as_many_parameters(recipe: str) -> None:
    """The real modules of whole recipes, with no memory behind their weights."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = parse_run_config(["--config", recipe])
    with FakeTensorMode(allow_non_fake_inputs=True):
        chunk = build_model(config, "local", initialize=False)[0]
        built = sum(parameter.numel() for parameter in chunk.parameters())
    assert built == count_parameters(config.model)


@pytest.mark.parametrize(
    "fields",
    [
        {"hybrid_layer_pattern": "M-*-F-"},
        {"hybrid_layer_pattern": "M M*- x2", "num_query_groups": 1},
        {"hybrid_layer_pattern": "*- x2", "short_convolution": True},
        {"hybrid_layer_pattern": "M-", "share_embeddings_and_output_weights": False},
        {"hybrid_layer_pattern": "*-", "kv_channels": 24, "d_conv": 3},
    ],
    ids=str,
)
def test_counts_hold_for_every_layer_kind(fields: dict) -> None:
    """Small models of all kinds, built for real and run once forward and backward."""
    model = ModelConfig(
        hidden_size=32, ffn_hidden_size=48, num_attention_heads=4, vocab_size=64, window_size=8
    )
    config = RunConfig(model=ModelConfig(**{**vars(model), **fields}))
    chunk = build_model(config, "local")[0]
    built = sum(parameter.numel() for parameter in chunk.parameters())
    assert built == count_parameters(config.model)
    tokens = torch.randint(0, 64, (2, 16))
    chunk(tokens, torch.arange(16).expand(2, -1), None, labels=tokens).mean().backward()
    for name, parameter in chunk.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("symbol", KINDS)
def test_matrix_products_equal_torchs_counter(symbol: str) -> None:
    """FLOPs of one layer and the head, against FlopCounterMode.

    torch counts matrix products only: the scan, the convolution and the gate are added by hand,
    and full attention without its causal half is what its kernel does.
    """
    model = ModelConfig(
        hybrid_layer_pattern=symbol,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=128,
        window_size=None,
    )
    length = 32
    config = RunConfig(model=model)
    config.kernels.windowed_attention = "reference"
    chunk = build_model(config, "local")[0]
    tokens = torch.randint(0, 128, (1, length))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunk(tokens, torch.arange(length)[None], None, labels=tokens)
    ours = flops_per_token(model, length).forward * length
    e, n = model.d_inner, model.d_state
    if symbol == "M":
        ours -= length * (7 * e * n + 4 * e + 2 * e * model.d_conv)
    if symbol in "*F":
        heads = model.num_attention_heads * model.head_dim
        causal = 4 * heads * (length + 1) / 2 * length
        ours += 4 * heads * length * length - causal
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("length", [4096, 32768, 1_048_576])
def test_attention_counts_only_the_window(length: int) -> None:
    """By hand: the first 2048 positions see 1, 2, … keys, the others 2048."""
    model = parse_run_config(["--config", "samba_421m"]).model
    seen = sum(range(1, 2049)) + 2048 * (length - 2048)
    kind = KINDS["*"]
    projections = 2 * 1536 * 1536 * 4
    assert kind.flops_per_token(model, length) == pytest.approx(
        projections + 4 * 1536 * seen / length, rel=1e-12
    )


def test_initial_weights_are_the_references() -> None:
    """Ranges of the Samba authors' initialisation (and Mamba's)."""
    config = RunConfig(
        model=ModelConfig("M-*-", hidden_size=64, ffn_hidden_size=96, num_attention_heads=4)
    )
    chunk = build_model(config, "local")[0]
    weights = {name: parameter.detach() for name, parameter in chunk.named_parameters()}
    mixer = "decoder.layers.0.mixer."
    assert weights["embedding.word_embeddings.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert torch.equal(
        weights[mixer + "A_log"],
        torch.log(torch.arange(1.0, 17.0)).expand(128, 16),
    )
    assert torch.equal(weights[mixer + "D"], torch.ones(128))
    dt = torch.nn.functional.softplus(weights[mixer + "dt_proj.bias"])
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 0.1 * 1.001
    for name, bound in {
        mixer + "in_proj.weight": 64**-0.5,
        mixer + "conv1d.weight": 0.5,
        mixer + "dt_proj.weight": 4**-0.5,
        mixer + "out_proj.weight": 128**-0.5 / 2,  # four residual branches
        "decoder.layers.1.mlp.linear_fc2.weight": 96**-0.5 / 2,
        "decoder.layers.2.self_attention.linear_proj.weight": 64**-0.5 / 2,
    }.items():
        assert weights[name].abs().max() <= bound, name
        assert weights[name].abs().max() > 0.95 * bound, name
