"""The shipped recipes: their sizes, by a formula that knows nothing of the model's code."""

import pytest

from samba_megatron.config import ModelConfig
from samba_megatron.config.checks import violations
from samba_megatron.config.load import parse_run_config
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.config.recipes import RECIPES, find_recipe, shipped_recipes

PARAMETERS = {
    "samba_tiny": 7_955_712,
    "samba_421m": 421_793_280,
    "samba_1.3b": 1_330_207_488,
    "samba_1.7b": 1_741_604_864,
    "samba_3.8b": 3_864_275_712,
    "llama2_438m": 438_081_024,
    "llama2_swa_438m": 438_081_024,
    "llama2_1.3b": 1_347_842_304,
    "llama2_swa_1.3b": 1_347_842_304,
    "llama3_1.6b": 1_640_597_504,
    "mamba_432m": 432_804_864,
    "mamba_1.3b": 1_334_740_992,
    "mamba_mlp": 454_657_536,
    "mamba_swa_mlp": 394_999_296,
    "mlp2_swa_mlp": 417_682_944,
    "samba_421m_nope": 421_793_280,
    "samba_421m_window_512": 421_793_280,
    "samba_421m_window_1024": 421_793_280,
    "samba_421m_gqa_12_1": 424_152_576,
    "samba_421m_gqa_12_2": 426_511_872,
    "samba_421m_gqa_12_4": 431_230_464,
    "samba_421m_gqa_6_1": 426_511_872,
    "samba_421m_full_attention_5": 449_180_160,
    "samba_421m_full_attention_1_5": 443_702_784,
    "samba_421m_short_convolution": 421_903_872,
    "llama2_swa_438m_short_convolution": 438_302_208,
    "samba_421m_long_context": 421_793_280,
    "samba_421m_instruct": 421_793_280,
    "samba_421m_passkey": 421_793_280,
    "samba_421m_phonebook": 421_793_280,
    "passkey_samba": 24_489_472,
    "passkey_swa": 24_320_512,
    "passkey_full": 24_320_512,
}
SMALL = {"samba_tiny", "passkey_samba", "passkey_swa", "passkey_full"}


def load(name, *options):
    return parse_run_config(["--config", name, *options])


def count_parameters(model: ModelConfig) -> int:
    """The reference's formula: 6.25d² + 110d a Mamba mixer, for d a multiple of 16."""
    d, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    assert (model.d_state, model.d_conv, model.expand, model.dt_rank) == (16, 4, 2, None)
    assert d % 16 == 0
    heads = model.num_attention_heads
    kv = (model.num_query_groups or heads) * (d // heads)
    attention = 2 * d * d + 2 * d * kv + (4 * (d + 2 * kv) if model.short_convolution else 0)
    layers = layer_symbols(model.hybrid_layer_pattern)
    return (
        v * d * (1 if model.share_embeddings_and_output_weights else 2)
        + layers.count("M") * (25 * d * d // 4 + 110 * d)
        + (layers.count("*") + layers.count("F")) * attention
        + layers.count("-") * 3 * d * f
        + (len(layers) + 1) * d
    )


def test_every_shipped_recipe_is_listed_here():
    assert set(shipped_recipes()) == set(PARAMETERS)
    assert len(list(RECIPES.rglob("*.yaml"))) == len(PARAMETERS), "two recipes share a name"


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_parameters(name, parameters):
    assert count_parameters(load(name).model) == parameters


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_runs_once_it_has_data_and_a_folder(name):
    config = load(name)
    assert config.name == name
    assert config.data.data_path == []
    (missing,) = [
        v for v in violations(config, 1, "cpu") if not v.startswith("checkpoint.save_int")
    ]
    assert missing.startswith("data.data_path is empty")
    ready = load(name, "--data.data_path", "corpus/train", "--run_dir", "run")
    for world_size in (1, 2, 4):
        assert violations(ready, world_size, "cuda", 8) == []


@pytest.mark.parametrize("name", [name for name in PARAMETERS if name not in SMALL])
def test_paper_recipes_fit_a_host_of_eight_with_fp8(name):
    options = ["--data.data_path", "corpus/train", "--run_dir", "run", "--precision.fp8", "hybrid"]
    assert violations(load(name, *options), 8, "cuda", 8) == []


@pytest.mark.parametrize(
    ("name", "tokens", "batch", "rate"),
    [
        ("samba_421m", 20 * 10**9, 512, 4e-4),
        ("samba_1.3b", 100 * 10**9, 512, 4e-4),
        ("samba_1.7b", 230 * 10**9, 2048, 6e-4),
        ("samba_3.8b", 3200 * 10**9, 2048, 6e-4),
    ],
)
def test_training_settings_are_the_papers(name, tokens, batch, rate):
    config = load(name)
    assert config.training.train_tokens == tokens
    assert (config.training.global_batch_size, config.data.sequence_length) == (batch, 4096)
    optimizer = config.optimizer
    assert (optimizer.lr, optimizer.min_lr) == (rate, pytest.approx(rate / 10, rel=1e-15))
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_grad) == (0.1, 1.0)
    assert (config.schedule.lr_decay_style, config.schedule.lr_warmup_fraction) == ("cosine", 0.01)
    assert config.model.window_size == 2048
    decays_everything = optimizer.weight_decay_exempt == []
    assert decays_everything == (name in ("samba_421m", "samba_1.3b"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_spikes_are_skipped_in_the_large_ones(name):
    assert load(name).faults.skip_spikes == (name not in SMALL)


def test_sizes_are_the_papers():
    assert load("samba_3.8b").model.head_dim == 256
    assert load("samba_1.7b").model.head_dim == 64
    blocks = {"421m": 12, "1.3b": 18, "1.7b": 24, "3.8b": 32}
    for size, number in blocks.items():
        pattern = load(f"samba_{size}").model.hybrid_layer_pattern
        assert layer_symbols(pattern) == "M-*-" * (number // 2)


def test_full_attention_is_where_the_name_says():
    layers = layer_symbols(load("samba_421m_full_attention_1_5").model.hybrid_layer_pattern)
    mixers = layers[::2]
    assert [block for block, mixer in enumerate(mixers) if mixer == "F"] == [1, 5]
    assert mixers.count("M") == 10


def test_a_path_wins_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samba_421m").write_text("name: mine\n")
    assert find_recipe("samba_421m").read_text() == "name: mine\n"
