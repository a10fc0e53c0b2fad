"""The code that is shipped with an export: caches, generation, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from samba_megatron.checkpoint.huggingface.shipped import operations_samba
from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import (
    SambaConfig,
    SambaHybridConfig,
)
from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import (
    SambaCache,
    SambaForCausalLM,
    SambaHybridForCausalLM,
)
from samba_megatron.checkpoint.huggingface.shipped.operations_samba import _carried, _scan_in_torch

VOCABULARY, WINDOW, PADDING = 64, 8, 1
PATTERNS = {
    "samba": None,
    "with full attention": "M-*-F-",
    "Mamba-SWA-MLP": "M*-M*-",
}


def build(name: str = "samba", **fields: Any) -> Any:
    torch.manual_seed(3)
    config_class = SambaConfig if PATTERNS[name] is None else SambaHybridConfig
    model_class = SambaForCausalLM if PATTERNS[name] is None else SambaHybridForCausalLM
    config = config_class(
        hidden_size=32,
        num_hidden_layers=4,
        attn={"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "window_size": WINDOW}
        | {"rope_theta": 10000.0},
        mlp_hidden_size=48,
        vocab_size=VOCABULARY,
        layer_pattern=PATTERNS[name],
        short_convolution=name == "Mamba-SWA-MLP",
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=PADDING,
        eos_token_id=0,
        **fields,
    )
    return model_class(config).eval()


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("chunks", [[1] * 30, [5, 1, 1, 13, 1, 9], [30]])
def test_in_pieces_with_the_cache_as_in_one(name, chunks):
    model, ids = build(name), tokens(2, 30)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache: Any = None
        pieces = []
        for piece in ids.split(chunks, dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=2e-5)
    assert cache.get_seq_length() == 30


def scan_inputs(length: int) -> list[torch.Tensor]:
    """Of two sequences, six channels and four states that decay slowly; the last one is a state."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    per_channel, per_state = (2, 6, length), (2, 4, length)
    delta, rates = normal(*per_channel) - 6, -normal(6, 4).exp()
    shared = [normal(*per_state), normal(*per_state), normal(6), normal(*per_channel), normal(6)]
    return [normal(*per_channel), delta, rates, *shared, 3 * normal(2, 6, 4)]


@pytest.mark.parametrize("length", [2, 128, 300])
def test_a_state_is_carried_beside_a_scan_that_has_none(length):
    """What makes a later piece of mamba-ssm's scan, which takes no state."""
    inputs = scan_inputs(length)
    u, delta, A, B, C, D, z, delta_bias, state = inputs
    expected, after = _scan_in_torch(*inputs)
    y, last = _scan_in_torch(u, delta, A, B, C, D, z, delta_bias, None)
    more, left = _carried(state, delta, A, C, delta_bias)
    assert (expected - y).abs().amax(dim=(0, 1))[-1] > 0.05, "a state that shows nothing"
    y += more * torch.nn.functional.silu(z)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last + left, after, rtol=1e-4, atol=1e-4)


def test_more_numbers_than_a_package_counts(monkeypatch):
    """Then sequences are computed one by one, which changes nothing."""
    inputs = scan_inputs(40)
    asked, scan = [], operations_samba._scan_in_torch

    def noted(u, *others):
        asked.append(u.shape[0])
        return scan(u, *others)

    monkeypatch.setattr(operations_samba, "_scan_in_torch", noted)
    y, state = operations_samba.selective_scan(*inputs)
    monkeypatch.setattr(operations_samba, "COUNTED", inputs[0].numel() // 2 + 1)
    one_by_one = operations_samba.selective_scan(*inputs)
    assert asked == [2, 1, 1]
    assert torch.equal(one_by_one[0], y) and torch.equal(one_by_one[1], state)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
def test_generation_with_and_without_the_cache(name, how):
    model, ids = build(name), tokens(2, 11)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(
            model.generate(ids, max_new_tokens=20, min_new_tokens=20, use_cache=use_cache, **how)
        )
    assert found[0].shape == (2, 31)
    assert len(set(found[0][0, 11:].tolist())) > 2
    assert torch.equal(*found)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("beams", [1, 2])
def test_left_padding_changes_nothing(name, beams):
    model, short, long = build(name), tokens(1, 5, seed=1), tokens(1, 13, seed=2)
    padded = torch.cat([torch.full((1, 8), PADDING), short], dim=1)
    batch = torch.cat([padded, long])
    mask = torch.ones_like(batch)
    mask[0, :8] = 0
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "num_beams": beams}
    together = model.generate(batch, attention_mask=mask, **options)
    for row, alone in ((0, short), (1, long)):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[row, 13:], expected[0, alone.shape[1] :])
    with torch.no_grad():
        padded_logits = model(batch, attention_mask=mask).logits
        torch.testing.assert_close(padded_logits[:1, 8:], model(short).logits, rtol=0, atol=2e-5)


def test_memory_does_not_depend_on_the_context():
    model = build()
    sizes = []
    for length in (WINDOW, 5 * WINDOW):
        with torch.no_grad():
            sizes.append(model(tokens(1, length), use_cache=True).past_key_values.memory())
    assert sizes[0] == sizes[1]
    config = model.config
    inner, heads = config.intermediate_size, 2
    ring = WINDOW * heads * config.attention_head_dim * 4 * 2 + WINDOW
    mamba = inner * (config.conv_kernel - 1) * 4 + inner * config.state_size * 4
    assert sizes[0] == 2 * ring + 2 * mamba


def test_a_long_prompt_in_chunks():
    model, ids = build(), tokens(1, 40)
    expected = model.generate(ids, max_new_tokens=8, min_new_tokens=8)
    found = model.generate(ids, max_new_tokens=8, min_new_tokens=8, prefill_chunk_size=7)
    assert torch.equal(found, expected)


def test_eager_attention_is_the_same():
    model, ids = build(), tokens(2, 20)
    eager = build(attn_implementation="eager")
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(eager(ids).logits, model(ids).logits, rtol=0, atol=2e-5)


def test_another_cache_is_refused():
    from transformers import DynamicCache

    with pytest.raises(TypeError, match="SambaCache, not DynamicCache"):
        build()(tokens(1, 3), past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, 3\]"):
        build()(tokens(1, 3), attention_mask=torch.ones(1, 2))


def test_a_cache_can_be_given_and_continued():
    model, ids = build(), tokens(1, 24)
    whole = model.generate(ids, max_new_tokens=6, min_new_tokens=6)
    cache = SambaCache(model.config)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
    continued = model.generate(ids, past_key_values=cache, max_new_tokens=6, min_new_tokens=6)
    assert torch.equal(continued, whole)


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", PATTERNS)
def test_gradient_checkpointing(name):
    model, ids = build(name), tokens(2, 20)
    plain = gradients(model, ids)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, ids)
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, tied: bool):
    model = build("with full attention")
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    shared = loaded.lm_head.weight is loaded.backbone.embeddings.weight
    assert shared == tied
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in half.named_parameters()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert wide >= {f"backbone.layers.0.mixer.{n}" for n in ("A_log", "D", "dt_proj.bias")}
    assert all(".mixer.A_log" in n or ".mixer.D" in n or ".dt_proj." in n for n in wide)
    with torch.no_grad():
        assert half(tokens(1, 20)).logits.dtype == torch.bfloat16


def test_initial_weights():
    model = build()
    mixer = model.backbone.layers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(64, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < float(steps.min()) < 5e-3 and 0.02 < float(steps.max()) < 0.11
    assert torch.equal(mixer.D, torch.ones(64))


def test_trainer_trains(tmp_path: Path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, ids = build(), tokens(8, 16)
    data = [{"input_ids": row, "labels": row} for row in ids]
    before = model.backbone.layers[0].mixer.A_log.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    result = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    first = result.evaluate()["eval_loss"]
    result.train()
    assert result.evaluate()["eval_loss"] < first
    assert not torch.equal(model.backbone.layers[0].mixer.A_log, before)


def test_an_export_saves_its_code_along(exports, own_modules, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(
        exports[0]["ablation"], trust_remote_code=True, dtype="auto"
    )
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids = tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert type(again).__name__ == "SambaHybridForCausalLM"
