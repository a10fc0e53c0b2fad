"""The check of a node and of the network, with real processes; and the sentences on bad figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.platform import nvidia_smi
from samba_megatron.platform.across import judge, partner_of, units_of
from samba_megatron.platform.matmul_rate import slow_ones
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "samba_megatron.platform.preflight"]


def check(output: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Runs the node check on a node called n7."""
    process = subprocess.run(
        [*COMMAND, "--output", str(output), *options],
        cwd=ROOT,
        env={**os.environ, "SLURMD_NODENAME": "n7"},
        capture_output=True,
        text=True,
    )
    report = json.loads((output / "n7.json").read_text())
    assert [path.name for path in output.iterdir()] == ["n7.json"]
    assert all(f"n7: {problem}" in process.stdout for problem in report["problems"])
    return process.returncode, report


def test_a_good_node(tmp_path: Path) -> None:
    code, report = check(tmp_path / "new")
    assert (code, report["ok"], report["problems"]) == (0, True, [])
    assert report["node"] == "n7" and report["free_gb"] > 0
    assert all(rate["tflops"] > 0 for rate in report["matmul"]) and report["matmul"]


def test_a_bad_node_says_everything_that_is_wrong(tmp_path: Path) -> None:
    """More room, GPUs and speed than any machine has."""
    options = ["--min-free-gb", "1e12", "--gpus", "4096", "--min-matmul-tflops", "1e9"]
    code, report = check(tmp_path, *options)
    assert (code, report["ok"]) == (77, False)
    for words in ("GB free, 1e+12 are wanted", "4096 are wanted", "TFLOP/s, 1e+09 are wanted"):
        assert any(words in problem for problem in report["problems"]), (words, report)


def test_help_is_quick_and_a_bad_folder_is_one_sentence(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['preflight', '--help']\n"
        "from samba_megatron.platform.preflight import main\n"
        "try: main()\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    (tmp_path / "file").touch()
    result = subprocess.run(
        [*COMMAND, "--output", str(tmp_path / "file" / "below")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.startswith("error: --output ")


def start_across(output: Path, ranks: int, seconds: float) -> "list[subprocess.Popen[str]]":
    """One process a rank, two on each of the pretended nodes n0, n1, …"""
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [*COMMAND, "--output", str(output), "--across", "--across-seconds", str(seconds)],
            cwd=ROOT,
            env={**os.environ, **world, "RANK": str(rank), "SLURMD_NODENAME": f"n{rank // 2}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def test_the_network_of_four_ranks(tmp_path: Path) -> None:
    processes = start_across(tmp_path, 4, 60)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    report = json.loads((tmp_path / "across.json").read_text())
    assert report["ok"] and report["ranks"] == 4 and report["all_reduce_gb_per_s"] > 0
    assert set(report["exchange_gb_per_s"]) == {"n0", "n1"}


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    processes = start_across(tmp_path, 4, 30)
    processes[3].send_signal(signal.SIGSTOP)  # while it imports
    processes[2].send_signal(signal.SIGSTOP)
    time.sleep(1)
    processes[2].send_signal(signal.SIGCONT)  # slow, but it answers
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes[:3]]
    finally:
        processes[3].kill()
        processes[3].communicate()
    assert [process.returncode for process in processes[:3]] == [77] * 3, outputs
    report = json.loads((tmp_path / "across.json").read_text())
    assert report["problems"] == ["rank 3 did not start within 30 s"]


def test_every_unit_meets_others_in_turn() -> None:
    for count in (2, 3, 4, 7, 8):
        units = units_of([f"n{rank // 2}" for rank in range(2 * count)])
        assert len(units) == count
        met = set()
        for turn in range(count - 1):
            for rank in range(2 * count):
                partner = partner_of(rank, units, turn)
                if partner is not None:
                    assert partner_of(partner, units, turn) == rank
                    assert partner % 2 == rank % 2 and partner // 2 != rank // 2
                    assert (rank, partner) not in met
                    met.add((rank, partner))
    assert units_of(["n0"] * 3) == [[0], [1], [2]]


def test_a_slow_node_is_told_from_its_partners() -> None:
    """n2 is slow with everyone; each of its partners was fast with somebody else."""
    nodes = ["n0", "n1", "n2", "n3"]
    pairs = [[40.0, 42.0, 5.0], [41.0, 5.0, 40.0], [5.0, 5.0, 6.0], [5.0, 41.0, 40.0]]
    report = judge(nodes, [{"pairs": rates, "all_reduce": 4.5} for rates in pairs])
    assert report["nodes"] == ["n2"] and not report["ok"]
    assert "n2 exchanges 6 GB/s" in report["problems"][0]
    even = judge(nodes, [{"pairs": [40.0 + rank], "all_reduce": 40.0} for rank in range(4)])
    assert even["ok"] and even["nodes"] == []


def test_a_slow_gpu_is_told_from_its_neighbours() -> None:
    rates = [{"device": f"cuda:{n}", "tflops": 700.0 - n} for n in range(8)]
    assert slow_ones(rates) == []
    rates[5]["tflops"] = 400.0
    assert slow_ones(rates) == ["cuda:5 reaches 400.0 TFLOP/s, its neighbours 697.0"]


SMI = """\
0, NVIDIA H100 80GB HBM3, 81559, 3, 31, 345, 1980, 0, No, No, Not Active, Not Active
1, NVIDIA H100 80GB HBM3, 81559, 61234, 88, 345, 1980, 2, Yes, No, Active, Not Active
2, NVIDIA H100 80GB HBM3, 40000, 3, [N/A], 345, 1980, [N/A], [N/A], Yes, [N/A], Not Active
"""


def test_what_nvidia_smi_says() -> None:
    gpus = nvidia_smi.parse(SMI)
    assert [gpu["index"] for gpu in gpus] == ["0", "1", "2"]
    assert "temperature.gpu" not in gpus[2]
    found = list(nvidia_smi.problems(gpus))
    assert not [problem for problem in found if problem.startswith("GPU 0")]
    for words in ("GPU 1 has 2 uncorrected", "GPU 1 could not remap", "GPU 1 is slowed down",
                  "GPU 1 has 61234 MiB", "GPU 2 must be reset", "GPU 2 has 40000 MiB"):  # fmt: skip
        assert sum(words in problem for problem in found) == 1, (words, found)
    assert nvidia_smi.parse("NVIDIA-SMI has failed\n") == []


@pytest.mark.parametrize("key", ["name", "test_name"])
def test_what_dcgmi_says(key: str) -> None:
    tests = [{key: "Memory", "results": [{"status": "Fail"}]}, {key: "PCIe", "status": "Pass"}]
    found = {"DCGM Diagnostic": {"test_categories": [{"category": "x", "tests": tests}]}}
    assert list(nvidia_smi.failed_tests(found)) == ["Memory"]
