"""tools/benchmark_generation.py at toy size: what it measures, reports and refuses."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from samba_megatron.platform.errors import UserError
from tools import benchmark_generation

SIZES = {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "window_size": 16,
    "vocab_size": 128,
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs it on a toy Samba and a toy Transformer."""
    for name, pattern in {"samba": "M-*- x2", "transformer": "F- x4"}.items():
        recipe = {"name": name, "model": {"hybrid_layer_pattern": pattern, **SIZES}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))

    def run(*options: str) -> Path:
        recipes = ["--recipe", tmp_path / "samba.yaml", "--baseline", tmp_path / "transformer.yaml"]
        arguments = ["--output", tmp_path / "out", *recipes, "--device", "cpu", "--dtype", "fp32"]
        monkeypatch.setattr(
            sys, "argv", ["benchmark_generation.py", *map(str, arguments), *options]
        )
        benchmark_generation.main()
        return tmp_path / "out"

    return run


def test_measures_and_reports(command, capsys) -> None:
    output = command(
        *("--prompt-lengths", "48", "24", "--positions", "8", "32", "--decode-batch", "2"),
        *("--decode-lengths", "4", "20", "64"),
    )
    found = json.loads((output / "generation.json").read_text())
    assert [point["tokens"] for point in found["prompts"]] == [24, 48]
    assert [point["position"] for point in found["positions"]] == [8, 32]
    short, long, too_long = found["decoding"]["eager"]
    for role in ("model", "baseline"):
        first, second = (point[role]["eager"] for point in found["positions"])
        assert short[role] == pytest.approx(4 * first)
        half = first + (second - first) / 2
        assert long[role] == pytest.approx(8 * first + 12 * (first + half) / 2)
        assert role not in too_long, "nothing is said of what was not measured"
    text = (output / "generation.md").read_text()
    ratio = f"{found['prompts'][1]['baseline'] / found['prompts'][1]['model']:.2f}"
    assert "| 48 |" in text and f"| {ratio} |" in text and "kernels: torch" in text
    assert (output / "generation.png").stat().st_size > 10_000
    assert text in capsys.readouterr().out


def test_the_time_limit_is_kept_and_said(command) -> None:
    output = command("--time-limit", "1e-9")
    found = json.loads((output / "generation.json").read_text())
    assert found["prompts"] == found["positions"] == [] and not found["decoding"]
    assert "left out for --time-limit: tokens after 64 and more" in found["notes"]


def test_memory_that_runs_out_halves_the_batch_of_both(command, monkeypatch) -> None:
    import torch

    seconds = benchmark_generation._token_seconds
    tried = []

    def of_little_memory(model, position, batch, clock):
        tried.append(batch)
        if batch > 2 and position > 8:
            raise torch.cuda.OutOfMemoryError
        return seconds(model, position, batch, clock)

    monkeypatch.setattr(benchmark_generation, "_token_seconds", of_little_memory)
    output = command(
        *("--positions", "8", "16", "--decode-batch", "8", "--prompt-lengths", "8"),
        *("--decode-lengths", "8"),
    )
    found = json.loads((output / "generation.json").read_text())
    assert found["decode_batch"] == 2 and tried == [8, 8, 8, 4, 4, 4, 2, 2, 2, 2]
    assert "out of memory: both models write 2 texts at a time" in found["notes"]


def test_a_full_cache_is_as_one_that_was_read() -> None:
    """The ring's slots after a wrap: a step on a filled cache computes what any other does."""
    from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import SambaConfig
    from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import SambaForCausalLM

    config = SambaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        attn={"layers": [1], "num_heads": 2, "window_size": 8, "rope_theta": 1e4},
        mlp_hidden_size=32,
        vocab_size=32,
    )
    cache = benchmark_generation._filled(SambaForCausalLM(config), 21, 2, "cpu")
    assert cache.seen == cache.states[1].seen == 21
    assert cache.states[1].keys.shape == (2, 2, 8, 16) and bool(cache.states[1].valid.all())
    assert cache.states[0].conv.shape == (2, 64, 3) and cache.states[0].scan.shape == (2, 64, 16)


def test_mistakes_are_one_sentence(command) -> None:
    with pytest.raises(UserError, match="--positions: give whole numbers of 1 or more"):
        command("--positions", "0")
    with pytest.raises(UserError, match="there is no recipe nowhere"):
        command("--recipe", "nowhere")
