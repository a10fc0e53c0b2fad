"""The passkey experiment: its mistakes, and where its models run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.passkey_experiment import MODELS, _share_gpus

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "said"),
    [("prepare", "has datasets already: choose another folder"), ("run", "has no passkey.idx")],
)
def test_mistakes_are_one_sentence_before_any_work(tmp_path, command: str, said: str) -> None:
    (tmp_path / "text.idx").touch()
    folder = ["--output", str(tmp_path)] + ["--data", str(tmp_path)] * (command == "run")
    words = [sys.executable, str(ROOT / "tools" / "passkey_experiment.py"), command, *folder]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and said in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


def test_models_share_the_gpus_that_are_visible(monkeypatch) -> None:
    def places(visible: str) -> list[str]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return [place["CUDA_VISIBLE_DEVICES"] for place in _share_gpus(list(MODELS)).values()]

    assert places("4,6,7,1") == ["4", "6", "7"]
    assert places("5,2") == ["5", "2", "5"]
    assert places("3") == ["3"] * 3
    assert places("") == [""] * 3, "none stays none"
