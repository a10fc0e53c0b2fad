"""tools/benchmark.py at toy size: what it measures, reports, leaves out and refuses."""

import json
import math
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from samba_megatron.benchmarks import kernels, own_step, report, results
from samba_megatron.benchmarks.plan import Plan, Shape
from samba_megatron.ops.backends import OPERATIONS
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.findings import Finding, State
from tools import benchmark

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "measure_training.py"
TOY = {
    "hybrid_layer_pattern": "M-*-",
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "window_size": 8,
    "vocab_size": 64,
}
MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "node": "here",
    "date": "2026-01-01",
    "on_gpu": True,
    "copy_bytes_per_second": 2.9e12,
    "product_flops_per_second": 7e14,
    "versions": {"torch": "2.11.0"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({"name": "toy", "model": TOY}))
    return str(path)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str):
    """Runs it on the toy; what it has written."""

    def run(*options: str) -> dict[str, Any]:
        words = ["--output", str(tmp_path / "out"), "--recipe", recipe, *options]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
        benchmark.main()
        return json.loads((tmp_path / "out" / "benchmark.json").read_text())

    return run


def test_measures_kernels_and_layers(command, tmp_path, capsys) -> None:
    found = command(
        *("--parts", "kernels", "layers", "--seconds", "0.005", "--sequence-length", "16"),
        *("--micro-batch-size", "2", "--also", "1x24"),
    )
    measured = {(row["operation"], row["kernel"], row["shape"]) for row in found["kernels"]}
    names = ("selective_scan", "causal_conv1d", "windowed_attention", "swiglu", "rotary")
    assert measured >= {(name, "torch", shape) for name in names for shape in ("2x16", "1x24")}
    for row in found["kernels"]:
        least, most = row["both_ms"][1:]
        assert 0 < least <= row["both_ms"][0] <= most
        assert row["both_us_per_1000"] == pytest.approx(
            1e6 * row["both_ms"][0] / Shape.parse(row["shape"]).tokens, rel=1e-3
        )
        assert 0 < row["both_share_of_floor"] < math.inf
    layers = {row["layer"]: row for row in found["layers"]}
    assert list(layers) == ["mamba", "mlp", "attention"]
    assert layers["mlp"]["parameters"] == 3 * 32 * 48 + 32
    assert layers["mlp"]["flops_per_second"] == pytest.approx(
        3 * 6 * 32 * 48 * layers["mlp"]["tokens_per_second"], rel=1e-3
    )
    left_out = {case["case"]: case["why"] for case in found["not_measured"]}
    assert "mamba: fla" in left_out and "swiglu: fla at 2x16" in left_out
    text, output = capsys.readouterr()[0], tmp_path / "out"
    assert (output / "benchmark.md").read_text() in text
    assert "| selective_scan" in text and "| mamba " in text and "torch 2." in text
    assert (output / "benchmark.png").stat().st_size > 10_000


def test_every_operation_has_its_sizes() -> None:
    known = kernels.subjects(Plan().model(), Shape(1, 8), "fp32")
    assert set(known) == set(OPERATIONS)


def test_measures_steps_as_training_takes_them(recipe, tmp_path) -> None:
    plan, said = Plan(recipe, batch=2, length=16, steps=4), list[str]()
    (finding,) = own_step.measure(TOOL, plan, ["fp32"], tmp_path / "step", math.inf, said.append)
    assert finding.state is State.OK, finding.found
    row = finding.figures
    assert row["kernel"] == "samba_megatron, fp32" and len(row["losses"]) == 4
    assert row["sequence_length"] == 16 and row["micro_batch_size"] == 2
    low, high = row["tokens_per_second_range"]
    assert 0 < low <= row["tokens_per_second"] <= high
    assert row["losses"][0] == pytest.approx(math.log(64), abs=0.3)
    assert any("4 steps" in line for line in said)


def test_a_step_that_is_left_out_and_one_that_fails_are_named(tmp_path, recipe) -> None:
    plan = Plan(recipe, length=16, steps=2)
    stop = time.monotonic() + 0.5  # no case is begun with so little
    (finding,) = own_step.measure(TOOL, plan, ["fp32"], tmp_path / "step", stop, print)
    assert (finding.state, finding.found) == (State.OFF, "left out for --time-limit")
    row = {"error": "UserError: precision.fp8 needs a GPU"}
    finding = own_step._finding(plan, "fp8_delayed", row, tmp_path)
    assert (finding.state, finding.found) == (State.BROKEN, row["error"])


def test_the_time_limit_is_kept_and_said(recipe, tmp_path) -> None:
    args = parsed("--output", str(tmp_path), "--recipe", recipe)
    late = benchmark.Benchmark(args, 0.0, time.monotonic() - 1, dict(MACHINE))
    cases = [Finding("kernels", f"case {n}", State.BROKEN, "no answer within 3 s") for n in "ab"]
    late.take(iter(cases))
    late.measure_steps()
    late.write()
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert [(c["case"], c["why"]) for c in found["not_measured"]] == [
        ("case a", "the time was over")
    ]
    assert found["notes"] == [
        "left out for --time-limit: cases that are not listed",
        "left out for --time-limit: step",
    ]


def test_what_was_found_outlives_what_breaks(recipe, tmp_path) -> None:
    args = parsed("--output", str(tmp_path), "--recipe", recipe)

    def findings():
        yield Finding("kernels", "swiglu: torch at 1x8", State.BROKEN, "memory did not suffice")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark.Benchmark(args, 0.0, math.inf, dict(MACHINE)).take(findings())
    assert "failed: swiglu: torch: memory did not suffice" in (
        (tmp_path / "benchmark.md").read_text()
    )


def test_steps_and_peers_in_one_table(tmp_path) -> None:
    """As on a GPU: shares of the stated peak, and bars of both."""
    rows = [("samba_megatron, bf16", False, 50_000, 78.8), ("fla, bf16 autocast", True, 25_000, 90)]
    step = {"micro_batch_size": 8, "sequence_length": 4096, "losses": [10.5, 10.25]}
    findings = [
        Finding(
            *("step", kernel, State.OK, ""),
            figures={
                **step,
                "kernel": kernel,
                "peer": peer,
                "tokens_per_second": rate,
                "tokens_per_second_range": [rate - 100, rate + 100],
                "flops_per_second": rate * 8.374e9,
                "memory_gib": memory,
            },
        )
        for kernel, peer, rate, memory in rows
    ]
    found = results.collect(Plan("samba_1.3b", 8, 4096, (), "bf16"), MACHINE, findings, [])
    assert found["step"][0]["mfu"] == pytest.approx(50_000 * 8.374e9 / 989e12)
    text = report.markdown(found)
    assert "50,000 (49,900…50,100)" in text and "42.3 %" in text and "10.50 → 10.25" in text
    assert "2,900 GB/s of 3,350 stated" in text
    report.plot(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5_000


def test_precisions_are_those_that_can_be_measured() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "measure_training.py"))
    assert set(benchmark.PRECISIONS) == set(tool["PRECISIONS"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "samba_1.3"], "there is no recipe samba_1.3: did you mean .*samba_1.3b"),
        (["--micro-batch-size", "0"], "--micro-batch-size 0: give 1 or more"),
        (["--sequence-length", "-4096"], "--sequence-length -4096: give 2 or more"),
        (["--steps", "1"], "--steps 1: give 2 or more"),
        (["--seconds", "0"], "--seconds 0.0: give seconds, more than 0"),
        (["--time-limit", "-5"], "--time-limit -5.0: give seconds, more than 0"),
        (["--time-limit", "0.01"], "--time-limit 0.01: over before any case: give more"),
        (["--also", "32768"], "shape '32768' is not batch x length, as 1x32768"),
    ],
)
def test_mistakes_are_one_sentence(command, options, message) -> None:
    with pytest.raises(UserError, match=message):
        command(*options)


@pytest.mark.parametrize(
    "options", [["--parts", "kernel"], ["--precisions", "fp16"], ["--steps", "many"]]
)
def test_unknown_words_are_refused(command, options, capsys) -> None:
    with pytest.raises(SystemExit):
        command(*options)
    assert options[0] in capsys.readouterr().err


def parsed(*words: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark.py", *words])
        return benchmark.parse_arguments()
