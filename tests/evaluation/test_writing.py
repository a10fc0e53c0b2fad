"""Steps that keep their tensors in place write what transformers writes; characters come whole."""

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from samba_megatron.data.tokenizer import Tokenizer
from samba_megatron.evaluation.reading import read
from samba_megatron.evaluation.writing import Continuation, Sampling, as_text
from tests.checkpoint.huggingface.test_modeling import PATTERNS, WINDOW, build, tokens

NEW = 24


def written(model, ids, graph=False, piece=100) -> list[list[int]]:
    with torch.inference_mode():
        cache, logits = read(model, ids, piece)
    return list(Continuation(model, cache, logits, Sampling(), NEW).tokens(NEW, graph))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("length", [3, WINDOW, 3 * WINDOW + 1])
def test_a_continuation_is_that_of_transformers(name, length) -> None:
    """From empty slots over a full ring and around it, however the prompt was read."""
    model, ids = build(name), tokens(2, length)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, max_new_tokens=NEW)[:, length:]
    for piece in (100, 5, 1):
        found = written(model, ids, piece=piece)
        assert torch.tensor(found).T.tolist() == expected.tolist(), f"pieces of {piece}"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_step_changes_tensors_in_their_places_only(name) -> None:
    """What a CUDA graph would write to and read from is what the step before has written."""
    model, ids = build(name), tokens(1, 5)
    with torch.inference_mode():
        writer = Continuation(model, *read(model, ids, 100), Sampling(), NEW)

    def places() -> list[int]:
        held = [t for state in writer.cache.states for t in state.tensors().values()]
        assert len(held) >= 2 * len(PATTERNS)
        return [tensor.data_ptr() for tensor in (writer.token, writer._position, *held)]

    steps = writer.tokens(NEW, graph=False)
    next(steps)
    before = places()
    assert len(list(steps)) == NEW - 1
    assert writer.is_still and places() == before
    assert int(writer._position) == 5 + NEW - 1


def test_a_model_with_another_cache_is_launched_from_python(capsys) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=64, num_attention_heads=2, eos_token_id=None, **sizes)
    model, ids = LlamaForCausalLM(config).eval(), tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=NEW)[0, 9:].tolist()
    assert [token for (token,) in written(model, ids, graph=True)] == expected
    said = "no CUDA graph (DynamicCache moves its tensors): Python launches each token\n"
    assert capsys.readouterr().err == said


def test_sampling_follows_the_probabilities() -> None:
    torch.manual_seed(1)
    chances = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = chances.log().expand(20_000, 4)

    def shares(**options: float) -> torch.Tensor:
        return Sampling(**options).choose(logits).bincount(minlength=4) / len(logits)

    assert shares().tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(shares(temperature=1.0), chances, rtol=0, atol=0.015)
    cooler = chances.square() / chances.square().sum()
    torch.testing.assert_close(shares(temperature=0.5), cooler, rtol=0, atol=0.015)
    likeliest = torch.tensor([0, 2 / 3, 0, 1 / 3])
    found = shares(temperature=1.0, top_p=0.7)
    torch.testing.assert_close(found, likeliest, rtol=0, atol=0.015)
    assert found[0] == found[2] == 0


def test_characters_are_shown_when_all_their_bytes_are_there(tmp_path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(tmp_path, "", 0, backend)
    before, text = tokenizer.encode("naïve 日本"), " a naïve 🦜, 日本 and one � more"
    parts = list(as_text(tokenizer, before, tokenizer.encode(text)))
    assert "".join(parts) == text
    assert parts[:15] == list(text[:15]), "a letter at a time"
    parrot = tokenizer.encode("🦜")
    assert "".join(as_text(tokenizer, before, parrot[:3])) == "�", "half a character at the end"
    broken = "".join(as_text(tokenizer, before, [parrot[1]] * 9 + tokenizer.encode("so")))
    assert broken.endswith("so") and set(broken[:-2]) == {"�"}
