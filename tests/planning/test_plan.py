"""The planner: legal layouts only, ranked; times against measured runs; bytes on the links."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from samba_megatron.config.load import parse_run_config
from samba_megatron.planning import plan, report
from samba_megatron.planning.communication import tensor_layer
from samba_megatron.planning.layout import Layout
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.hardware import gpu_named, gpus, peak_flops

ROOT = Path(__file__).parents[2]


def search(recipe: str, number: int, gpu: str, *fields: str) -> list[plan.Plan]:
    config = parse_run_config(["--config", recipe, *fields])
    return plan.search(config, number, gpu_named(gpu))


def test_the_command_needs_neither_torch_nor_a_gpu() -> None:
    """The whole of it, as a program that reads its JSON would."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(ROOT / 'tools' / 'plan_run.py')!r}, '--config', 'samba_3.8b', "
        "'--gpus', '1024', '--gpu', 'h200', '--top', '3', '--json']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    best, *others = json.loads(result.stdout)
    assert best["fits"] and len(others) == 2
    assert best["seconds"]["step"] <= others[0]["seconds"]["step"]
    assert best["gpus"] == 1024 == best["data_parallel_size"] * best["pipeline_model_parallel_size"]
    assert best["run"]["days"] == pytest.approx(3.2e12 / best["tokens_per_day"])
    assert best["checkpoint"]["bytes"] == 14 * 3_864_275_712


def test_proposals_are_what_the_rules_allow() -> None:
    """Also tensor parallelism, which 1.7B's heads allow up to the 8 GPUs of a node."""
    found = search("samba_1.7b", 64, "h100")
    assert {each.layout.tensor for each in found} == {1, 2, 4, 8}
    assert {each.layout.tensor for each in search("samba_3.8b", 64, "h100")} == {1}
    for each in found[:: len(found) // 40]:
        assert not plan.problems(each.layout.config, 64)
    fitting = [each for each in found if each.fits]
    assert found[: len(fitting)] == fitting
    assert fitting == sorted(fitting, key=lambda each: each.time.total)


def test_the_submitted_line_is_the_plan() -> None:
    best = search("samba_1.7b", 64, "a100")[5]
    words = ["--config", "samba_1.7b"]
    recipe = parse_run_config(words)
    line = report.submit_command(best, recipe, words, 230 * 10**9)
    parts = shlex.split(line)
    assert parts[1] == "slurm/submit.py" and parts[parts.index("--nodes") + 1] == "8"
    assert parts[parts.index("--until-tokens") + 1] == "230B"
    config = parse_run_config([*words, *report.overrides(best, recipe)])
    assert Layout(config, 64).tokens == best.layout.tokens
    assert plan.judge(config, 64, best.gpu).time.total == best.time.total


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (0, "--gpus is 0: it must be 1 or more"),
        (12, "--gpus 12 is not a number of whole nodes of 8 H100: use 8 or 16"),
        (1000, "no legal layout.*global_batch_size 2048.*960 or 1024 GPUs would do"),
    ],
)
def test_impossible_numbers_are_refused(number: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        search("samba_3.8b", number, "h100")


def test_what_does_not_fit_says_by_how_much(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "plan_run.py"), "--config", "samba_3.8b"]
    command += ["--gpus", "1", "--gpu", "h100", "--data.sequence_length", "1048576"]
    assert subprocess.run(command).returncode == 2
    error = capfd.readouterr().err
    assert error.startswith("error: no layout fits 1 H100: the nearest (TP 1, CP 1, PP 1")
    assert " GiB of 73.2, " in error and " too much: " in error


def test_gpus_are_found_by_their_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp8") == 1513e12
    assert peak_flops("NVIDIA GB200", "bf16") == 2500e12
    assert peak_flops("CPU (x86_64, 2 threads)", "bf16") is None
    assert all(gpu.source for gpu in gpus().values())
    with pytest.raises(UserError, match="no figures are known of a GPU 'v100': known are A100"):
        gpu_named("v100")


def test_bytes_on_the_links() -> None:
    """Data parallel: 4 bytes of gradient out and 2 of parameter back, (n - 1) / n of them. Tensor
    parallel with sequence parallelism: five passes of the residual stream a layer, by hand."""
    fields = ["--training.global_batch_size", "64", "--training.micro_batch_size", "4"]
    config = parse_run_config(["--config", "samba_1.7b", *fields])
    gpu = gpu_named("h200")
    (data,) = plan.judge(config, 16, gpu).time.transfers
    assert data.link == "network"
    assert data.bytes == pytest.approx(6 * 1_741_604_864 * 15 / 16)
    assert data.seconds == pytest.approx(data.bytes / (50e9 * gpu.achieved.network))
    assert 0 < data.exposed_seconds < data.seconds
    # Weights of linears in FP8 are gathered a byte each: Mamba 3·d·2d, attention, MLP 3·d·f.
    fp8 = config.precision
    fp8.fp8, fp8.fp8_param_gather = "hybrid", True
    (kept,) = plan.judge(config, 16, gpu).time.transfers
    in_fp8 = Layout(config, 16).kept_in_fp8(0)
    assert 0.85 * 1_741_604_864 < in_fp8 < 1_741_604_864
    assert data.bytes - kept.bytes == pytest.approx(in_fp8 * 15 / 16)
    fp8.fp8, fp8.fp8_param_gather = None, False
    parallel = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    layout = Layout(plan.with_fields(config, parallel), 16)
    size, forward, backward = tensor_layer(layout, gpu, "-")
    assert size == 5 * 4 * 4096 * 2048 * 2 * 3 / 4
    assert forward < backward
