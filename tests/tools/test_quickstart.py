"""The quickstart: what it uses again, and how it fails."""

import subprocess
import sys
from pathlib import Path

import pytest

from samba_megatron.tracking.metrics import FILE_NAME, read_metrics

ROOT = Path(__file__).parents[2]


def _quickstart(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "quickstart.py"), "--output", str(output)]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def test_a_failing_phase_ends_it_with_one_sentence_and_its_exit_code(tmp_path):
    wrong = ("--max-megabytes=1", "--vocab-size=10", "--devices=1")
    first, second = _quickstart(tmp_path, *wrong), _quickstart(tmp_path, *wrong)
    for result in (first, second):
        assert result.returncode == 2
        log = tmp_path / "logs" / "tokenizer.log"
        assert result.stderr.startswith("error: tokenizer failed: ")
        assert result.stderr.endswith(f"({log})\n")
        assert "vocab_size 10 is too small" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert "corpus: there already" not in first.stdout
    assert "corpus: there already" in second.stdout
    (tmp_path / "corpus" / "train.jsonl").unlink()
    assert "corpus: there already" not in _quickstart(tmp_path, *wrong).stdout


def test_refuses_a_run_without_steps(tmp_path):
    result = _quickstart(tmp_path, "--steps=0")
    assert result.returncode == 2
    assert result.stderr == "error: --steps, --resume-steps and --devices must be at least 1\n"


@pytest.mark.timeout(1200)
def test_goes_the_whole_way_once_and_uses_it_again(tmp_path):
    options = ("--steps=2", "--resume-steps=1", "--devices=1", "--max-megabytes=8")
    small = (
        "--model.hidden_size=64",
        "--model.ffn_hidden_size=128",
        "--validation.eval_tokens=2048",
    )
    overrides = ("--", *small)
    result = _quickstart(tmp_path, *options, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    records = read_metrics(tmp_path / "run" / FILE_NAME)
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3]
    held_out = {
        record["step"]: record["loss"]
        for record in records
        if record["kind"] == "validation" and record["sequence_length"] == 256
    }
    assert sorted(held_out) == [0, 1, 2, 3]
    assert held_out[2] < held_out[0]
    assert "resuming after step 2" in (tmp_path / "logs" / "resume.log").read_text()
    assert f"after resuming, 256 tokens   │ {held_out[3]:.3f} nats" in result.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "huggingface" / "model.safetensors").exists()
    assert "def __init__(self, " in (tmp_path / "logs" / "generate.log").read_text()

    again = _quickstart(tmp_path, *options, *overrides)
    assert again.returncode == 0
    assert again.stdout.count("there already, used again") == 8
    assert f"{held_out[3]:.3f} nats" in again.stdout

    wrong = _quickstart(tmp_path, *options, "--", "--model.hidden_sizes=3")
    assert wrong.returncode != 0
    assert wrong.stderr.startswith("error: train failed: ")
    assert "hidden_sizes" in wrong.stderr
    assert (tmp_path / "run-previous" / FILE_NAME).exists()
