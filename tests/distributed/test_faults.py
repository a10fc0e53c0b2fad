"""A run that is killed, stopped or given bad input, through the real entry point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.tracking import ledger
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


def wait_for(process: "subprocess.Popen[str]", file: Path, pattern: str) -> None:
    """Until a line of ``file`` has the pattern; the process must live."""
    while not file.exists() or not re.search(pattern, file.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


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
    """SIGUSR1: the step is finished, the state saved, code 75. The same command goes on, until a
    file named stop asks for the same. The ledger has both jobs."""
    config = toy_config(prefix, tmp_path, **{"training.train_steps": 2000})
    process = pretrain(config)
    metrics = tmp_path / "metrics.jsonl"
    wait_for(process, metrics, '"train"')
    process.send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "signal SIGUSR1 was received" in output
    end = read_metrics(metrics, "end")[-1]
    assert end["exit_code"] == 75
    done = len(losses(tmp_path))
    assert end["step"] == done
    again = pretrain(config)
    wait_for(again, metrics, f'"train", "time": [0-9.]+, "step": {done + 2},')
    (tmp_path / "stop").touch()
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 75, errors
    assert f"resuming after step {done}" in output
    assert not (tmp_path / "stop").exists()
    first, _, second, stopped = ledger.read(tmp_path)
    assert (first["event"], first["step"], first["world_size"]) == ("start", 0, 1)
    assert (second["event"], second["step"], second["resumed"]) == ("start", done, True)
    signalled = ledger.read(tmp_path, "end")[0]
    assert (signalled["code"], signalled["cause"], signalled["checkpoint_step"]) == (75, None, done)
    assert (stopped["code"], stopped["cause"]) == (75, "user stop")
    assert stopped["checkpoint_step"] == stopped["step"] == len(losses(tmp_path)) >= done + 2


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
    (end,) = ledger.read(tmp_path, "end")
    assert (end["code"], end["cause"]) == (76, "non-finite")
    checkpoints = sorted((tmp_path / "checkpoints").glob("step_*"))
    assert checkpoints
    for path in checkpoints:
        for prefix_of_weights in ("decoder.", "embedding."):
            for name, tensor in saved_tensors(path, prefix_of_weights).items():
                assert tensor.isfinite().all(), (path, name)


@pytest.mark.timeout(300)
def test_a_damaged_latest_checkpoint_is_passed_over_loudly(prefix: str, tmp_path: Path) -> None:
    """A bit of the last is turned over, the one before it is cut short: the run goes on from the
    third last."""
    config = toy_config(prefix, tmp_path, **{"checkpoint.save_interval": 2})
    first = pretrain({**config, "training.train_steps": 8, "checkpoint.save_at_end": True})
    output, errors = first.communicate(timeout=120)
    assert first.returncode == 0, errors
    second, last = (tmp_path / "checkpoints" / f"step_000000{step}" for step in (6, 8))
    file = next(last.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    os.truncate(next(second.glob("*.distcp")), 1000)

    again = pretrain({**config, "training.train_steps": 10})
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert f"WARNING: checkpoint {last} is corrupt: the contents of {file.name}" in output
    assert f"WARNING: checkpoint {second} is corrupt: " in output
    assert "resuming after step 4" in output
    (fallback,) = ledger.read(tmp_path, "fallback")
    assert fallback["step"] == 4 and len(fallback["corrupt"]) == 2
    assert len(losses(tmp_path)) == 10


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
    ends = ledger.read(tmp_path / "run", "end")
    assert {(end["code"], end["cause"]) for end in ends} == {(2, "user error")}
    assert len(ends) == len(MISTAKES) - 1, "only the command line's is found before the run is"
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
