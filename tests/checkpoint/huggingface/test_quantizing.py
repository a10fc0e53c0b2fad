"""Quantised exports of a small trained model: what is kept, what is packed, and what it costs."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.checkpoint.huggingface import companions, quantized
from samba_megatron.checkpoint.huggingface.loading import shipped_class
from samba_megatron.checkpoint.huggingface.quantizing import FORMATS, KEPT
from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import SambaConfig
from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import SambaForCausalLM
from samba_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from samba_megatron.platform.errors import UserError
from tools import quantize as tool

pytestmark = [
    pytest.mark.skipif(find_spec("modelopt") is None, reason="needs nvidia-modelopt"),
    pytest.mark.usefixtures("own_modules"),
]
TEXTS = [f"the {a} {b} {c}" for a in ("old", "new") for b in ("cat", "dog") for c in ("ran", "sat")]
LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in bf16 that has learnt a few sentences; the sentences beside it."""
    folder = tmp_path_factory.mktemp("quantize") / "samba-hf"
    train_tokenizer(TEXTS, 280, folder, show_progress=False)
    tokenizer = load_tokenizer(folder)
    lines = [" ".join(TEXTS[i % 8 :] + TEXTS[: i % 8]) for i in range(40)]
    data = folder.with_name("text.jsonl")
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    torch.manual_seed(5)
    config = SambaConfig(
        hidden_size=128,
        num_hidden_layers=2,
        attn={"layers": [1], "num_heads": 4, "window_size": 16, "rope_theta": 1e4},
        hidden_ratio=2,
        vocab_size=280,
        tie_word_embeddings=True,
        auto_map={
            "AutoConfig": "configuration_samba.SambaConfig",
            "AutoModelForCausalLM": "modeling_samba.SambaForCausalLM",
        },
    )
    network = SambaForCausalLM(config)
    ids = torch.tensor([token for line in lines[:8] for token in tokenizer.encode(line)])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        network(blocks[:8], labels=blocks[:8]).loss.backward()
        optimizer.step()
    for name, parameter in network.named_parameters():
        if not name.endswith((".A_log", ".D", ".dt_proj.bias")):
            parameter.data = parameter.data.to(torch.bfloat16)
    network.config.dtype = "bfloat16"
    network.save_pretrained(folder)
    companions.copy_code(folder)
    return folder


def run(
    monkeypatch: pytest.MonkeyPatch, model: Path, output: Path, *options: str, device: str = "cpu"
) -> Any:
    """The command; its report."""
    arguments = ["--model", model, "--output", output, "--device", device, "--length", LENGTH]
    arguments += ["--calibration", model.with_name("text.jsonl"), "--samples", "30"]
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, arguments), *options])
    tool.main()
    return json.loads((output / "quantization.json").read_text())


@pytest.mark.parametrize(
    ("name", "algorithm", "dtype", "cost"),
    [
        ("fp8", "FP8", torch.float8_e4m3fn, 0.03),
        ("int8_sq", "W8A8_SQ_PER_CHANNEL", torch.int8, 0.03),
        ("int4_awq", "W4A16_AWQ", torch.uint8, 0.2),
    ],
)
def test_a_format(model, tmp_path, monkeypatch, capsys, name, algorithm, dtype, cost) -> None:
    output = tmp_path / name
    report = run(monkeypatch, model, output, "--format", name)
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    assert before < 20, "a model that has learnt nothing shows nothing"
    assert after == pytest.approx(before, rel=cost)
    assert report["perplexity"]["read_back"] == pytest.approx(before, rel=cost)
    assert 0 < report["error"]["read_back"] < 2 * report["error"]["in_memory"] + 1e-3
    assert report["bytes"]["after"] < 0.75 * report["bytes"]["before"]
    said = capsys.readouterr().out
    assert f"{after:.3f}" in said and "12 matrices quantised" in said
    description = json.loads((output / quantized.DESCRIPTION).read_text())["quantization"]
    assert description["quant_algo"] == algorithm
    assert description["exclude_modules"] == [
        "backbone.embeddings",
        *(f"backbone.layers.0.mixer.{kept}" for kept in ("conv1d", "dt_proj", "x_proj")),
        "lm_head",
    ]
    tensors, source = quantized.read_tensors(output), quantized.read_tensors(model)
    packed = {k for k, tensor in tensors.items() if tensor.dtype == dtype}
    assert packed == {f"{layer}.weight" for layer in report["quantized"]} and len(packed) == 12
    assert tensors["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    for kept in ("mixer.A_log", "mixer.D", "mixer.conv1d.weight", "mixer.dt_proj.bias"):
        key = f"backbone.layers.0.{kept}"
        assert torch.equal(tensors[key], source[key])
    assert (output / "tokenizer.json").is_file() and (output / "modeling_samba.py").is_file()


def test_keeping_more(model, tmp_path, monkeypatch) -> None:
    output = tmp_path / "more"
    report = run(monkeypatch, model, output, "--format", "fp8", "--keep", *KEPT, "layers.0", "mlp")
    assert report["quantized"] == [f"backbone.layers.1.mixer.{n}_proj" for n in "koqv"]


def test_four_bit_floats_are_read_as_modelopt_packs_them() -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    torch.manual_seed(2)
    weight = torch.randn(32, 64)
    packed, scale, scale_2 = NVFP4QTensor.quantize(weight, 16)
    tensors = {"x.weight_scale": scale, "x.weight_scale_2": scale_2}
    found = quantized._unpacked("NVFP4", packed._quantized_data, "x", tensors)
    expected = packed.dequantize(
        scale=scale, double_scale=scale_2, block_sizes={-1: 16}, dtype=torch.float32
    )
    torch.testing.assert_close(found, expected)
    assert float((found - weight).norm() / weight.norm()) < 0.15


@pytest.mark.gpu
def test_four_bit_floats_on_a_gpu(model, tmp_path, monkeypatch) -> None:
    report = run(monkeypatch, model, tmp_path / "nvfp4", "--format", "nvfp4", device="cuda")
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    assert after == pytest.approx(before, rel=0.3)
    assert report["perplexity"]["read_back"] == pytest.approx(before, rel=0.3)


def test_an_export_that_reads_back_wrongly_gets_no_name(model, tmp_path, monkeypatch) -> None:
    from samba_megatron.platform.errors import ExitWith

    unpacked = quantized._unpacked
    monkeypatch.setattr(quantized, "_unpacked", lambda *given: unpacked(*given).flip(0))
    with pytest.raises(ExitWith, match="reads back as another model"):
        run(monkeypatch, model, tmp_path / "wrong", "--format", "int8_sq")
    assert not (tmp_path / "wrong").exists()


def test_mistakes_are_one_sentence(model, tmp_path, monkeypatch) -> None:
    assert tuple(FORMATS) == tool.FORMATS and KEPT == tool.KEPT
    cases = {
        ("--format", "nvfp4"): "--format nvfp4 needs a GPU",
        ("--format", "fp8", "--keep", "backbone"): "leaves nothing to quantise",
        ("--format", "fp8", "--samples", "0"): "--samples must be 1 or more",
        ("--format", "fp8", "--length", "99999"): "has fewer than 99999 tokens",
        ("--format", "fp8", "--model", "/nowhere"): "/nowhere has no config.json",
        ("--format", "fp8", "--calibration", str(tmp_path / "x.jsonl")): "x.jsonl",
        ("--format", "fp8", "--calibration", str(tmp_path / "x")): "x.idx",
        ("--format", "fp8", "--output", str(model)): "is not an empty folder",
    }
    for options, said in cases.items():
        with pytest.raises(UserError, match=said):
            run(monkeypatch, model, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_an_export_is_loaded_by_its_own_code(model, monkeypatch) -> None:
    """Also where another class goes by its name, as an imported flash-linear-attention's does."""
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    class Config(LlamaConfig):
        model_type = "samba"

    class Other(LlamaForCausalLM):
        config_class = Config

    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "samba", Config)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, Config, Other)
    taken = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=True)
    assert type(taken) is Other, "what this is about does not happen here"
    loaded = shipped_class(model).from_pretrained(model, dtype="auto")
    assert type(loaded).__name__ == "SambaForCausalLM"
    assert torch.equal(
        loaded.state_dict()["backbone.layers.0.mixer.A_log"],
        quantized.read_tensors(model)["backbone.layers.0.mixer.A_log"],
    )


def test_a_folder_without_code_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="brings no code of its own"):
        shipped_class(tmp_path)
