"""What transformers' libraries and users take for granted of any causal language model.

The subjects are those of transformers' own common tests of models and of generation, as far as
they apply; docs/huggingface.md names those that cannot.
"""

import inspect
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import logging

from samba_megatron.checkpoint.huggingface.shipped import modeling_samba
from tests.checkpoint.huggingface.test_modeling import PADDING, PATTERNS, build, tokens
from tests.compiling import call_apart, must_compile

LENGTH = 14


def logits(model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(*arguments, **options).logits
    return found


@pytest.fixture(params=PATTERNS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


# Signature and outputs


def test_signature(model: Any) -> None:
    names = list(inspect.signature(model.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert {"inputs_embeds", "labels", "past_key_values", "logits_to_keep"} <= set(names)
    assert model.main_input_name == "input_ids" and isinstance(model, GenerationMixin)
    assert model.can_generate()


def test_a_tuple_holds_what_the_named_output_holds(model: Any) -> None:
    ids = tokens(2, LENGTH)
    options = {"labels": ids, "output_hidden_states": True, "use_cache": True}
    with torch.no_grad():
        named, bare = model(ids, **options), model(ids, **options, return_dict=False)
    assert isinstance(bare, tuple) and len(bare) == len(named.to_tuple()) == 4
    assert torch.equal(bare[0], named.loss) and torch.equal(bare[1], named.logits)
    assert bare[2].seen == LENGTH
    assert all(torch.equal(a, b) for a, b in zip(bare[3], named.hidden_states, strict=True))


def test_hidden_states(model: Any) -> None:
    """The embedding's, each block's, the last one normed; by flag, by configuration; with grads."""
    ids, config = tokens(2, LENGTH), model.config
    output = model(ids, output_hidden_states=True)
    states = output.hidden_states
    assert [tuple(s.shape) for s in states] == [(2, LENGTH, 32)] * (len(config.blocks) + 1)
    assert torch.equal(states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(states[-1]), output.logits)
    for state in states:
        state.retain_grad()
    output.logits.sum().backward()
    assert all(state.grad is not None for state in states)
    assert model(ids).hidden_states is None
    config.output_hidden_states = True
    assert len(model(ids).hidden_states) == len(states)


def test_attention_weights_are_not_to_be_had_and_that_is_said(caplog) -> None:
    model, ids = build(), tokens(1, LENGTH)
    logger = logging.get_logger(modeling_samba.__name__)
    logger.addHandler(caplog.handler)
    output = model(ids, output_attentions=True)
    logger.removeHandler(caplog.handler)
    assert output.get("attentions") is None
    assert "output_attentions is ignored" in caplog.text


def test_loss_and_logits_to_keep(model: Any) -> None:
    ids = tokens(2, LENGTH)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
        kept = model(ids, logits_to_keep=3).logits
        chosen = model(ids, logits_to_keep=torch.tensor([2, 5])).logits
    flat = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, flat)
    assert torch.equal(kept, output.logits[:, -3:])
    assert torch.equal(chosen, output.logits[:, [2, 5]])


def test_repeated_and_batched_calls_agree(model: Any) -> None:
    ids = tokens(3, LENGTH)
    together = logits(model, ids)
    assert torch.equal(together, logits(model, ids))
    rows = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(together, rows, rtol=0, atol=1e-5)


# Embeddings


def test_embeddings_instead_of_tokens(model: Any) -> None:
    ids = tokens(2, LENGTH)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(logits(model, inputs_embeds=embedded), logits(model, ids))
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**wrong)
    options = {"max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(ids, **options)[:, LENGTH:]
    for cache in (True, False):
        assert torch.equal(
            model.generate(inputs_embeds=embedded, use_cache=cache, **options), expected
        )


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_can_grow_and_shrink(tied: bool, tmp_path: Path) -> None:
    model, ids = build(), tokens(1, LENGTH)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    before = logits(model, ids)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 70
    assert model.get_output_embeddings().weight.shape[0] == 70
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    grown = logits(model, torch.cat([ids, torch.tensor([[69]])], dim=1))
    torch.testing.assert_close(grown[:, :LENGTH, :64], before)
    model(ids, labels=ids).loss.backward()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.vocab_size == 70
    model.resize_token_embeddings(64, mean_resizing=False)
    torch.testing.assert_close(logits(model, ids), before)


def test_embeddings_can_be_replaced() -> None:
    model = build()
    new = torch.nn.Embedding(64, 32)
    model.set_input_embeddings(new)
    model.tie_weights()
    assert model.get_input_embeddings() is new and model.backbone.get_input_embeddings() is new
    assert model.lm_head.weight is new.weight
    head = torch.nn.Linear(32, 64, bias=False)
    model.set_output_embeddings(head)
    assert model.get_output_embeddings() is head


# Loading


def test_what_a_file_lacks_gets_initial_values(tmp_path: Path) -> None:
    """And is named; a tied head is not missed."""
    from safetensors.torch import load_file, save_file

    model = build()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content = load_file(file)
    assert "lm_head.weight" not in content
    absent = {
        f"backbone.layers.0.mixer.{name}"
        for name in ("A_log", "D", "dt_proj.bias", "dt_proj.weight", "conv1d.weight")
    } | {"backbone.norm_f.weight"}
    save_file({k: v for k, v in content.items() if k not in absent}, file, {"format": "pt"})
    loaded, said = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(said["missing_keys"]) == absent and not said["unexpected_keys"]
    mixer = loaded.backbone.layers[0].mixer
    assert torch.equal(mixer.D, torch.ones(64))
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17.0).expand(64, 16))
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min().item() > 0.5e-3 and steps.max().item() < 0.2
    kept = "backbone.layers.1.mixer.q_proj.weight"
    assert torch.equal(loaded.state_dict()[kept], content[kept])


def test_other_shapes_are_refused_or_made_anew(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        type(model).from_pretrained(tmp_path, vocab_size=50)
    loaded = type(model).from_pretrained(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    assert loaded.get_input_embeddings().weight.shape == (50, 32)
    assert logits(loaded, tokens(1, 5) % 50).isfinite().all()


def test_other_ways_to_store_and_place(tmp_path: Path) -> None:
    """Several files, torch's own format, a folder that layers are fetched from when needed."""
    pytest.importorskip("accelerate")
    model, ids = build("with full attention"), tokens(1, LENGTH)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "many"), ids), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = build("with full attention")
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(logits(fresh, ids), expected)
    placed = type(model).from_pretrained(
        tmp_path / "many",
        device_map={
            "backbone.embeddings": "cpu",
            "backbone.layers.0": "cpu",
            "backbone.layers.1": "disk",
            "backbone.layers.2": "disk",
            "backbone.norm_f": "cpu",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )
    torch.testing.assert_close(logits(placed, ids), expected)


def test_the_configuration_comes_back(tmp_path: Path) -> None:
    for name in PATTERNS:
        config = build(name).config
        config.save_pretrained(tmp_path)
        again = type(config).from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert type(config)(**json.loads(config.to_json_string())).blocks == config.blocks


# Training


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_can_be_switched(reentrant: bool) -> None:
    model, ids = build(), tokens(2, LENGTH)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    model.train().enable_input_require_grads()
    output = model(ids, labels=ids, use_cache=True)
    assert output.past_key_values is None, "a cache would be filled twice"
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


# Generation

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 0.9},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling beams": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_generate(way: str) -> None:
    """With scores, states and cache returned; the cache changes nothing."""
    model, ids, found = build("with full attention"), tokens(2, 9), []
    for cache in (True, False):
        torch.manual_seed(11)
        output = model.generate(
            ids,
            max_new_tokens=7,
            min_new_tokens=7,
            use_cache=cache,
            return_dict_in_generate=True,
            output_scores=True,
            output_hidden_states=True,
            **WAYS[way],
        )
        found.append(output.sequences)
        assert len(output.scores) == 7 and len(output.hidden_states) == 7
        assert (output.past_key_values is not None) == cache
        if cache:
            assert output.past_key_values.get_seq_length() == 15
    rows = 2 * WAYS[way].get("num_return_sequences", 1)
    assert found[0].shape == (rows, 16) and torch.equal(*found)


def test_generation_goes_on_from_what_it_returned() -> None:
    model, ids = build("Mamba-SWA-MLP"), tokens(1, 9)
    whole = model.generate(ids, max_new_tokens=10, min_new_tokens=10)
    options = {"min_new_tokens": 5, "max_new_tokens": 5, "return_dict_in_generate": True}
    first = model.generate(ids, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert torch.equal(second.sequences, whole)


def test_generation_stops_and_pads() -> None:
    model, ids = build(), tokens(3, 9)
    free = model.generate(ids, max_new_tokens=12, min_new_tokens=12)
    stop = int(free[0, 11])
    settings = GenerationConfig(max_new_tokens=12, eos_token_id=stop, pad_token_id=PADDING)
    found = model.generate(ids, generation_config=settings)
    for row, expected in zip(found[:, 9:], free[:, 9:], strict=True):
        written = expected.tolist()
        count = written.index(stop) + 1 if stop in written else 12
        assert row[:count].tolist() == written[:count]
        assert set(row[count:].tolist()) <= {PADDING}


def test_what_needs_a_cache_that_goes_back_is_refused() -> None:
    """A state of a scan cannot forget its last tokens: drafts that are rejected could not be."""
    model, ids = build(), tokens(1, 9)
    for options in ({"assistant_model": build()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="[Aa]ssisted"):
            model.generate(ids, max_new_tokens=4, **options)


def test_other_kinds_of_cache_are_not_used() -> None:
    """transformers warns; what comes out is the same."""
    model, ids = build(), tokens(1, 9)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    found = model.generate(
        ids, cache_implementation="static", return_dict_in_generate=True, **options
    )
    assert isinstance(found.past_key_values, modeling_samba.SambaCache)
    assert torch.equal(found.sequences, model.generate(ids, **options))


# Compilers


def compile_and_compare(name: str) -> None:
    model, ids = build(name), tokens(2, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), must_compile():
        found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, logits(model, ids, use_cache=False))


@pytest.mark.parametrize("name", ["with full attention", "Mamba-SWA-MLP"])
def test_export_and_compile(name: str) -> None:
    """The forward pass without padding is one graph."""
    model, ids = build(name), tokens(2, 4)
    expected = logits(model, ids, use_cache=False)
    with torch.no_grad():
        exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.testing.assert_close(exported.module()(ids, use_cache=False).logits, expected)
    module = "tests.checkpoint.huggingface.test_as_transformers_expects"
    call_apart(module, "compile_and_compare", name)
