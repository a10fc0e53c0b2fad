"""status.py from files alone: no Slurm on the machine, a run in any of its states."""

import sys
from pathlib import Path

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.config.load import to_yaml
from samba_megatron.platform.errors import UserError
from samba_megatron.tracking import ledger
from samba_megatron.tracking.metrics import MetricsFile
from slurm.status import main


def show(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: str = ""
) -> str:
    """What the command prints; Slurm's commands are not found."""
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["status.py", str(run)])
    main()
    return capsys.readouterr().out


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Half-way: one job lost a node, the next is not over."""
    config = RunConfig(run_dir=str(tmp_path))
    config.training.train_tokens = 2_000_000
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "config.yaml").write_text(to_yaml(config))
    metrics = MetricsFile(tmp_path)
    for step in range(1, 11):
        speed = {"tokens_per_second": 1000.0 * step}
        metrics.write("train", step=step, loss=9.0 - step / 10, tokens=step * 100_000, **speed)
    metrics.close()
    (tmp_path / "checkpoints" / "step_0000008").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step_0000008\n")
    ledger.append(tmp_path, "job_start", job=7, nodes=["n1", "n2"], checkpoint=-1)
    end = {"cause": "node failure", "decision": "requeue", "checkpoint": 8}
    ledger.append(tmp_path, "job_end", job=7, code=1, reason="down or silent: n2 (down*)", **end)
    ledger.append(tmp_path, "bad_nodes", nodes={"n2": "exchanges 1 GB/s"})
    ledger.append(tmp_path, "job_start", job=7, restart=1, nodes=["n1", "n3"], checkpoint=8)
    return tmp_path


def test_everything_on_one_screen(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = show(run, monkeypatch, capsys)
    for words in (
        "job 7 started and has not said its end",
        "1M of 2M (50.0%)",
        "6K tokens/s",
        "8.0000",
        "step_0000008",
        "2m46s of training",
        "1 (1 × node failure)",
        "n2 (exchanges 1 GB/s)",
        "down or silent: n2",
    ):
        assert words in text, (words, text)
    assert len(text.splitlines()) < 24


@pytest.mark.parametrize(
    ("decision", "words"),
    [("done", "done (done"), ("hold", "a person must look"), ("stop", "submit again to go on")],
)
def test_how_it_ended(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    decision: str,
    words: str,
) -> None:
    end = {"cause": "done", "decision": decision, "checkpoint": 10, "reason": "because"}
    ledger.append(run, "job_end", job=7, restart=1, code=0, **end)
    assert words in show(run, monkeypatch, capsys)


def test_before_the_first_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm").mkdir()
    assert "not started" in show(tmp_path, monkeypatch, capsys)


def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no run's folder"):
        show(tmp_path, monkeypatch, capsys)
    with pytest.raises(UserError, match="no folder"):
        show(tmp_path / "none", monkeypatch, capsys)
