"""On a GPU: tools/benchmark.py with the peers that are installed, at a size of seconds."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
]
ROOT = Path(__file__).parents[2]
SIZES = {
    "hybrid_layer_pattern": "M-*- x2",
    "hidden_size": 256,
    "ffn_hidden_size": 512,
    "num_attention_heads": 4,
    "window_size": 128,
    "vocab_size": 1024,
}
PEERS = {
    "fla": ("fla", "mamba_ssm", "causal_conv1d", "flash_attn"),
    "mamba_ssm": ("mamba_ssm", "causal_conv1d"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts of one run."""
    folder = tmp_path_factory.mktemp("benchmark")
    recipe = folder / "small.yaml"
    recipe.write_text(yaml.safe_dump({"name": "small", "model": SIZES}))
    words = [
        *(sys.executable, str(ROOT / "tools" / "benchmark.py"), "--output", str(folder / "out")),
        *("--recipe", str(recipe), "--micro-batch-size", "2", "--sequence-length", "256"),
        *("--also", "1x512", "--steps", "8", "--seconds", "0.02", "--precisions", "bf16"),
    ]
    result = subprocess.run(words, capture_output=True, text=True, timeout=880)
    assert result.returncode == 0, result.stderr[-4000:]
    print(result.stdout)
    return json.loads((folder / "out" / "benchmark.json").read_text())


def installed(peer: str) -> bool:
    return all(find_spec(package) is not None for package in PEERS[peer])


def test_nothing_failed(found) -> None:
    assert [case for case in found["not_measured"] if case["kind"] == "failed"] == []


def test_kernels_and_their_peers(found) -> None:
    measured = {(row["operation"], row["kernel"]) for row in found["kernels"]}
    wanted = {("selective_scan", "fused"), ("swiglu", "triton"), ("windowed_attention", "torch")}
    wanted |= {("rotary", "triton")}
    if installed("mamba_ssm"):
        wanted |= {("selective_scan", "mamba_ssm"), ("selective_scan", "mamba_ssm, its own layout")}
    if find_spec("fla"):
        wanted |= {(name, "fla") for name in ("causal_conv1d", "windowed_attention", "swiglu")}
    assert measured >= wanted
    assert {row["shape"] for row in found["kernels"]} == {"2x256", "1x512"}


def test_layers_and_their_peers_are_of_one_size(found) -> None:
    by_layer: dict[str, set[int]] = {}
    for row in found["layers"]:
        by_layer.setdefault(row["layer"], set()).add(row["parameters"])
    assert set(by_layer) == {"mamba", "mlp", "attention"}
    assert all(len(sizes) == 1 for sizes in by_layer.values()), by_layer
    peers = {row["kernel"] for row in found["layers"] if row["peer"]}
    assert peers == {peer for peer in PEERS if installed(peer)}


def test_steps_and_their_peers_train_the_same_size(found) -> None:
    rows = {row["kernel"]: row for row in found["step"]}
    wanted = {"samba_megatron, bf16"}
    if installed("fla"):
        wanted |= {"fla, bf16 autocast", "fla, bf16 weights"}
    assert set(rows) == wanted
    for row in rows.values():
        assert row["losses"][0] == pytest.approx(math.log(1024), abs=0.5)
        assert row["parameters"] == rows["samba_megatron, bf16"]["parameters"]
        assert row["tokens_per_second"] > 0 and row["memory_gib"] > 0
