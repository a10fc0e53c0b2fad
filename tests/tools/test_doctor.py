"""The doctor on this machine, and on machines that lack or break something."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samba_megatron.ops import library_trials, measuring, trials
from samba_megatron.ops.backends import OPERATIONS
from samba_megatron.ops.causal_conv1d.dispatch import causal_conv1d
from samba_megatron.platform import installed
from samba_megatron.platform.findings import Finding, State, look
from samba_megatron.platform.trials import run_in_children

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "doctor.py"


def test_everything_that_this_machine_can_run_is_run():
    """The whole tool, as a script uses it."""
    done = subprocess.run([sys.executable, TOOL, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["ok"]
    found = {(finding["area"], finding["name"]): finding for finding in report["findings"]}
    for name, operation in OPERATIONS.items():
        for backend in operation.backends.values():
            kernel = found["kernels", f"{name}: {backend.name}"]
            if backend.unavailable():
                assert kernel["state"] in ("off", "poor")
            else:
                assert kernel["state"] == "ok"
                assert 0 < kernel["figures"]["error"] < 2e-2
                assert kernel["figures"]["milliseconds"] > 0
    fused = found["kernels", "selective_scan: fused"]
    assert fused["state"] == ("ok" if torch.cuda.is_available() else "off")
    for name in ("torch", "collectives", "megatron-core"):
        assert found["libraries", name]["state"] == "ok"
    assert found["packages", "megatron-core"]["found"] == "0.19.2"
    assert found["machine", "disk"]["figures"]["free_gib"] > 0


CRASHES = """
import os, time
from samba_megatron.platform.findings import Finding, State
from samba_megatron.platform.trials import serve
import sys

def good():
    print("noise on standard output")
    return Finding("kernels", "good", State.OK, f"in {os.getpid()}")

def fail():
    raise RuntimeError("CUDA error: an illegal memory access\\nand more")

serve([
    ("kernels", "good", good),
    ("kernels", "abort", os.abort),
    ("kernels", "hang", lambda: time.sleep(60)),
    ("kernels", "fail", fail),
    ("kernels", "good", good),
], int(sys.argv[1]))
"""


def test_what_crashes_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    """An abort, a hang, a poisoned CUDA context; what follows is tried in a new process."""
    (tmp_path / "crashing.py").write_text(CRASHES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    first, abort, hang, fail, last = run_in_children("crashing", seconds=10)
    assert (first.state, last.state) == (State.OK, State.OK)
    assert first.found != last.found
    assert (abort.name, abort.state) == ("abort", State.BROKEN)
    assert "SIGABRT" in abort.found
    assert hang.name == "hang" and re.fullmatch("no answer within 1[0-9] s", hang.found), hang
    assert fail.found == "RuntimeError: CUDA error: an illegal memory access"


def test_a_child_that_cannot_start_is_one_finding(tmp_path, monkeypatch):
    (tmp_path / "unstartable.py").write_text("import nothing_of_this_name")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (only,) = run_in_children("unstartable", seconds=20)
    assert only.state is State.BROKEN
    assert "No module named 'nothing_of_this_name'" in only.found


def test_a_probe_that_fails_fails_alone():
    def fails() -> Finding:
        raise OSError("no such device")

    def works() -> Finding:
        return Finding("machine", "second", State.OK, "there")

    first, second = look("machine", [("first", fails), ("second", works)])
    assert (first.name, first.state) == ("first", State.POOR)
    assert "no such device" in first.found
    assert second.state is State.OK


def test_missing_packages_matter_where_there_is_a_gpu():
    """Each lack says what it costs and what mends it; another version than the pinned is said."""
    pins = {"transformer-engine": "2.20.2", "megatron-core": "0.1"}
    with_gpu = {finding.name: finding for finding in look("", installed.probes(pins, True))}
    without = {finding.name: finding for finding in look("", installed.probes(pins, False))}
    if with_gpu["transformer-engine"].found == "not installed":
        engine = with_gpu["transformer-engine"]
        assert (engine.state, engine.fix) == (State.POOR, "make setup-gpu")
        assert "no FP8" in engine.meaning
        assert without["transformer-engine"].state is State.OFF
    assert with_gpu["megatron-core"].found == "0.19.2, tested with 0.1"
    assert with_gpu["megatron-core"].state is State.POOR


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_kernel_that_computes_wrongly_is_broken(factor):
    def wrong(backend, reset=None, **inputs):
        """Only inside documents."""
        bad = backend == "torch" and reset is not None
        return causal_conv1d(**inputs, reset=reset, backend=backend) * (factor if bad else 1)

    finding = trials.try_backend("causal_conv1d", "torch", wrong, trials.conv_inputs)
    assert finding.state is State.BROKEN
    assert "computes wrongly" in finding.meaning
    assert measuring.judge("", "", float("nan"), torch.float32, 1.0).state is State.BROKEN


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that torch sees")
def test_a_gpu_that_torch_does_not_see_is_broken(tmp_path, monkeypatch):
    """nvidia-smi lists one, torch has none: training would silently be slow."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, Some GPU, 80000, 0, 30, 1000, 2000, 0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (_, _, trial), *_ = library_trials.before()
    finding = trial()
    assert finding.state is State.BROKEN
    assert "nvidia-smi finds 1 GPUs" in finding.found


def test_before_the_setup_it_names_the_remedy(tmp_path):
    """A Python without the packages; and a folder that is not there."""
    bare = subprocess.run([sys.executable, "-S", str(TOOL)], capture_output=True, text=True)
    assert bare.returncode == 1
    assert bare.stderr.startswith("error: ") and "make setup" in bare.stderr
    assert len(bare.stderr.splitlines()) == 1
    wrong = [sys.executable, str(TOOL), "--disk", str(tmp_path / "none")]
    done = subprocess.run(wrong, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error: --disk {tmp_path}/none is no folder: name one that exists\n"
