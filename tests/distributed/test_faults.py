"""A run that is killed, stopped or given bad input, through the real entry point."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import (
    ROOT,
    launch,
    losses,
    saved_tensors,
    toy_config,
    write_dataset,
)


def command_line(config: dict[str, Any]) -> list[str]:
    """Fields as the command line has them."""
    parts: list[str] = []
    for name, value in config.items():
        parts += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return parts


def pretrain(config: dict[str, Any], **kwargs: Any) -> "subprocess.Popen[str]":
    """One process of the entry point, without a launcher."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain" / "pretrain_samba.py"), *command_line(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Byte tokens of real text."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.mark.timeout(600)
def test_killed_run_ends_equal(prefix: str, tmp_path: Path) -> None:
    """SIGKILL to all processes, twice, with background saves every third step."""
    config = toy_config(prefix, tmp_path, **{"checkpoint.save_interval": 3})
    config.pop("run_dir")
    result = subprocess.run(
        [
            *(sys.executable, str(ROOT / "tools" / "kill_and_resume.py")),
            *("--kills", "2", "--longest-wait", "1", "--output", str(tmp_path)),
            *("--", *command_line({**config, "training.train_steps": 30})),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    logs = [path.read_text()[-2000:] for path in tmp_path.glob("*.log")]
    assert result.returncode == 0, (result.stderr, *logs)
    assert "all 30 losses equal, bit for bit" in result.stdout
    assert len(json.loads((tmp_path / "kills.json").read_text())) == 2


@pytest.mark.timeout(300)
def test_signal_saves_and_asks_to_be_started_again(prefix: str, tmp_path: Path) -> None:
    """SIGUSR1 → the step is finished, the state saved, code 75; then the same command goes on."""
    config = toy_config(prefix, tmp_path, **{"training.train_steps": 2000})
    process = pretrain(config)
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or b'"train"' not in metrics.read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "signal SIGUSR1 was received" in output
    end = read_metrics(metrics, "end")[-1]
    assert end["exit_code"] == 75
    done = len(losses(tmp_path))
    assert end["step"] == done
    again = pretrain({**config, "training.exit_step": done + 2})
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 75, errors
    assert f"resuming after step {done}" in output
    assert len(losses(tmp_path)) == done + 2


@pytest.mark.timeout(300)
def test_nothing_non_finite_is_saved(prefix: str, tmp_path: Path) -> None:
    """A learning rate that explodes: code 76, a reason, and finite weights in every checkpoint."""
    fields: dict[str, Any] = {
        "optimizer.lr": 1e30,
        "optimizer.min_lr": 1e29,
        "optimizer.clip_grad": 0.0,
    }
    fields |= {"checkpoint.save_interval": 1, "checkpoint.async_save": False}
    process = pretrain(toy_config(prefix, tmp_path, **fields))
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 76, (output[-2000:], errors[-2000:])
    assert "Traceback" not in errors
    checkpoints = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert checkpoints
    for path in checkpoints:
        for prefix_of_weights in ("decoder.", "embedding."):
            for name, tensor in saved_tensors(path, prefix_of_weights).items():
                assert tensor.isfinite().all(), (path, name)


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown field": ({"model.hiden_size": 32}, ["hiden_size", "model.hidden_size"]),
    "missing data": ({"data.data_path": ["/nowhere/text"]}, ["/nowhere/text"]),
    "no data": ({"data.data_path": []}, ["data.data_path"]),
    "illegal layout": ({"parallel.tensor_model_parallel_size": 3}, ["tensor_model_parallel_size"]),
    "tokens outside": ({"model.vocab_size": 64}, ["vocab"]),
    "forced kernel": ({"kernels.selective_scan": "mamba_ssm"}, ["mamba_ssm", "cuda", "torch"]),
    "no such kernel": ({"kernels.selective_scan": "magic"}, ["magic", "torch"]),
    "backend": ({"kernels.transformer_impl": "transformer_engine"}, ["transformer_engine", "GPU"]),
    "load from nowhere": ({"checkpoint.load": "/nowhere/checkpoints"}, ["/nowhere/checkpoints"]),
    "bad signal": ({"training.exit_signals": ["SIGNONE"]}, ["SIGNONE"]),
}


@pytest.mark.timeout(300)
def test_mistakes_get_one_sentence(prefix: str, tmp_path: Path) -> None:
    """Code 2, one line that names the thing, no traceback, no checkpoint."""
    for name, (fields, words) in MISTAKES.items():
        process = pretrain({**toy_config(prefix, tmp_path / "run"), **fields})
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 2, (name, output[-1000:], errors[-3000:])
        assert errors.count("error: ") == 1, (name, errors)
        assert all(word in errors for word in words), (name, errors)
        assert "Traceback" not in errors, (name, errors)
    assert not list(tmp_path.glob("run/checkpoints/step_*"))


@pytest.mark.timeout(300)
def test_truncated_dataset_is_refused(tmp_path: Path) -> None:
    """A .bin shorter than its .idx says."""
    prefix = write_dataset(tmp_path)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-10])
    process = pretrain(toy_config(prefix, tmp_path / "run"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"{prefix}.bin" in errors or f"{prefix}" in errors


@pytest.mark.timeout(600)
def test_batch_ramp_and_schedule(prefix: str, tmp_path: Path) -> None:
    """A ramp by tokens takes the sizes it should; a resumed run continues it."""
    fields: dict[str, Any] = {
        "training.train_steps": 12,
        "training.rampup_start_batch_size": 2,
        "training.rampup_batch_size_increment": 2,
        "training.rampup_tokens": 1536,
    }
    whole = {"name": "whole", "config": toy_config(prefix, tmp_path / "whole", **fields)}
    part = {"name": "part", "config": toy_config(prefix, tmp_path / "part", **fields)}
    stopped = toy_config(prefix, tmp_path / "part", **fields, **{"training.exit_step": 5})
    first = {"name": "part", "config": stopped, "exit_code": 75}
    launch(1, [whole, first, part], tmp_path)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl", "train")
    # Three stages of 512 tokens: 2, 4 and 6 sequences of 64, then 8.
    assert [r["global_batch_size"] for r in records] == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8, 8, 8]
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
