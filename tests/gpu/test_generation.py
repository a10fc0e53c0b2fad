"""On a GPU: tokens that a CUDA graph writes are those that Python launches one by one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samba_megatron.checkpoint.huggingface.shipped import operations_samba
from samba_megatron.evaluation.reading import read
from samba_megatron.evaluation.writing import Continuation, Sampling
from tests.checkpoint.huggingface.test_modeling import (
    PATTERNS,
    WINDOW,
    build,
    scan_inputs,
    tokens,
)
from tests.evaluation import conftest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
NEW = 40

text, tokenizer = conftest.text, conftest.tokenizer
checkpoint, exported = conftest.checkpoint, conftest.exported


def written(model, ids, sampling: Sampling, graph: bool) -> list[list[int]]:
    torch.manual_seed(1)
    with torch.inference_mode():
        cache, logits = read(model, ids, 10)
    return list(Continuation(model, cache, logits, sampling, NEW).tokens(NEW, graph))


@torch.backends.cudnn.flags(allow_tf32=False)
@pytest.mark.parametrize("length", [3, 3 * WINDOW + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_a_graph_writes_what_python_launches(name, dtype, length, capfd) -> None:
    """Around the ring; greedily, and with random numbers, which go on from replay to replay."""
    model, ids = build(name).to("cuda"), tokens(2, length).cuda()
    for parameter, value in model.named_parameters():
        if not parameter.endswith(("A_log", ".D", "dt_proj.bias")):
            value.data = value.data.to(dtype)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        graph, python = (written(model, ids, sampling, graph) for graph in (True, False))
        assert graph == python, sampling
        assert len({tuple(token) for token in python}) > 2, "a text that shows nothing"
    assert "no CUDA graph" not in capfd.readouterr().err
    if dtype == torch.float32:
        model.generation_config.eos_token_id = None
        expected = model.generate(ids, max_new_tokens=NEW)[:, length:]
        assert torch.tensor(written(model, ids, Sampling(), True)).T.tolist() == expected.tolist()


def test_the_command_takes_a_graph(checkpoint, tokenizer) -> None:
    """And says so where it cannot; the same text without."""
    options = ["--checkpoint", checkpoint, "--tokenizer", tokenizer.path.parent, "--piece", 7]
    options += ["--prompt", "def main(arguments):", "--dtype", "fp32"]
    command = [sys.executable, ROOT / "tools" / "generate.py", *options, "--max-new-tokens", 60]
    found = [
        subprocess.run([*map(str, command), *more], capture_output=True, text=True, check=True)
        for more in ([], ["--no-cuda-graph"])
    ]
    assert found[0].stdout == found[1].stdout
    assert "GB of GPU memory" in found[0].stderr and "no CUDA graph" not in found[0].stderr


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=str
)
def test_a_later_piece_takes_the_kernel_and_the_state(dtype, tolerance, monkeypatch) -> None:
    pytest.importorskip("mamba_ssm")
    u, delta, A, B, C, D, z, delta_bias, state = (tensor.cuda() for tensor in scan_inputs(300))
    u, delta, B, C, z = (tensor.to(dtype) for tensor in (u, delta, B, C, z))
    inputs = (u, delta, A, B, C, D, z, delta_bias, state)
    expected = operations_samba._scan_in_torch(*inputs)
    monkeypatch.setattr(operations_samba, "_scan_in_torch", None)
    for found, wanted in zip(operations_samba.selective_scan(*inputs), expected, strict=True):
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
