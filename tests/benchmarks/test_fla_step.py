"""flash-linear-attention's Samba beside this project's: the same model, trained by the same loop.

Its kernels need a GPU; what is before and around them is tried here.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.benchmarks import fla_step, peers
from samba_megatron.benchmarks.plan import Plan
from samba_megatron.config import ModelConfig
from samba_megatron.model.samba import count_parameters
from samba_megatron.platform.findings import Finding

ROOT = Path(__file__).parents[2]
SIZES = ModelConfig(
    "M-*- x2",
    hidden_size=64,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    window_size=8,
    vocab_size=96,
)


def build_fla() -> None:
    """Builds fla's model; as if the packages of its kernels were there, for which its classes look
    before they are built."""
    from fla.layers import attn, mamba

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attn, "flash_attn_func", print)
        patch.setattr(mamba, "is_fast_path_available", True)
        model: Any = fla_step.build(SIZES, 32, "bf16 autocast")
        parameters = dict(model.named_parameters())
        assert sum(p.numel() for p in parameters.values()) == count_parameters(SIZES)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        kinds = [type(block.mixer).__name__ for block in model.backbone.layers]
        assert kinds == ["Mamba", "Attention"] * 2
        attention = model.backbone.layers[1].mixer
        assert (attention.window_size, attention.num_kv_heads) == (8, 2)
        assert model.lm_head.weight is model.backbone.embeddings.weight
        half = fla_step.build(SIZES, 32, "bf16 weights")
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        patch.setattr(fla_step, "count_parameters", lambda model: count_parameters(model) + 1)
        with pytest.raises(ValueError, match=r"fla's model has .* parameters, not"):
            fla_step.build(SIZES, 32, "bf16 autocast")
    print("compared")


def test_it_is_the_same_model_and_another_is_refused() -> None:
    """In a process of its own: once imported, fla's classes stand for every model of its names."""
    code = "from tests.benchmarks.test_fla_step import build_fla; build_fla()"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.endswith("compared\n"), result.stderr


def test_without_its_kernels_it_is_named(recipe, monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    plan = Plan(recipe, length=16)
    findings = findings_of(plan)
    assert [finding.state for finding in findings] == ["off", "off"]
    assert "fla's kernels need a GPU" in findings[0].found
    beyond = dataclasses.replace(SIZES, short_convolution=True)
    monkeypatch.setattr(Plan, "model", lambda self: beyond)
    assert "cannot express this model (a short convolution)" in findings_of(plan)[0].found
    assert peers.unavailable(["mamba_ssm"]) == "the package mamba_ssm is not installed"


@pytest.mark.parametrize("way", fla_step.WAYS)
def test_the_loop_trains(recipe, way) -> None:
    """On the shipped class, which is called as fla's is: the random tokens are learnt by heart."""
    plan = Plan(recipe, length=16, steps=7)
    row = fla_step.train(shipped(plan), plan, way, batch=2)
    assert row["steps"] == 2 and len(row["losses"]) == 7
    assert row["losses"][-1] < row["losses"][0]
    low, high = row["tokens_per_second_range"]
    assert low <= row["tokens_per_second"] <= high
    assert row["parameters"] == count_parameters(plan.model())


def test_a_loss_that_is_not_finite_is_no_measurement(recipe) -> None:
    plan = Plan(recipe, length=16, steps=2)
    model = shipped(plan)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        fla_step.train(model, plan, "bf16 autocast", batch=1)


def test_a_batch_that_does_not_fit_is_halved(recipe, monkeypatch) -> None:
    tried = []

    def of_little_memory(model, plan, way, batch):
        tried.append(batch)
        if batch > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"tokens_per_second": 1.0, "memory_gib": 1.0, "micro_batch_size": batch}

    monkeypatch.setattr(fla_step, "train", of_little_memory)
    monkeypatch.setattr(fla_step, "build", lambda *_: None)
    monkeypatch.setattr(peers, "unavailable", lambda _: None)
    finding = fla_step.measure(dataclasses.replace(Plan(recipe), batch=8), "bf16 weights")
    assert tried == [8, 4, 2] and finding.figures["micro_batch_size"] == 2
    assert "at a micro-batch of 2: memory did not suffice for 8" in finding.found


def findings_of(plan: Plan) -> list[Finding]:
    return [run() for _, _, run in fla_step.trials(plan)]


def shipped(plan: Plan) -> torch.nn.Module:
    from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import SambaConfig
    from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import SambaForCausalLM

    torch.manual_seed(1)
    return SambaForCausalLM(SambaConfig(**fla_step.fla_fields(plan.model(), plan.length)))
