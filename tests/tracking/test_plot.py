"""A run's losses, drawn from its metrics file."""

import subprocess
import sys
from pathlib import Path

import matplotlib.image

from samba_megatron.tracking.metrics import MetricsFile

TOOL = Path(__file__).parents[2] / "tools" / "plot_metrics.py"


def test_draws_a_run_with_a_loss_that_was_not_finite(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.write("validation", step=0, sequence_length=512, loss=9.7)
    for step in range(1, 40):
        metrics.write("train", step=step, loss=float("nan") if step == 7 else 9 - step / 10)
    metrics.close()
    result = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True)
    assert result.stdout.decode() == f"{tmp_path}/loss.png\n"
    assert matplotlib.image.imread(tmp_path / "loss.png").shape == (540, 960, 4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_says_that_there_is_no_run(tmp_path):
    result = subprocess.run([sys.executable, str(TOOL), str(tmp_path)], capture_output=True)
    assert result.returncode == 2
    assert result.stderr.decode() == (
        f"error: {tmp_path}/metrics.jsonl does not exist: name the folder of a run that has begun\n"
    )
