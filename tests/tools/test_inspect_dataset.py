"""The command as a user runs it: a dataset, its documents, a blend file, and mistakes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ["The first document.", "The second one: [b]not bold[/b] – ünïcode\n\ttoo.", "x " * 3000]


def run(*arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"{ROOT}/tools/inspect_dataset.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == expect, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer and a dataset of three documents."""
    path = tmp_path_factory.mktemp("inspect")
    train_tokenizer(TEXTS, 300, path / "tokenizer", False)
    tokenizer = load_tokenizer(path / "tokenizer")
    with IndexedWriter(path / "d", np.uint16) as writer:
        for text in TEXTS:
            writer.add_document(np.array([*tokenizer.encode(text), tokenizer.eod]))
        writer.finish()
    return path


def test_a_dataset_its_documents_and_a_plot(folder):
    shown = run(
        *(folder / "d", "--documents", "0-1,2", "--tokenizer", folder / "tokenizer"),
        *("--plot", folder / "d.png", "--characters", 100),
    ).stdout
    for text in TEXTS[:2]:
        assert text.split("\n")[0] in shown
    assert "x x x" in shown
    assert "more characters" in shown
    assert "all under the vocabulary of 300" in shown
    assert (folder / "d.png").stat().st_size > 0
    assert "── document 1" in run(folder / "d", "--documents", "1", "--quick").stdout


def test_a_blend_file_and_damage(folder, tmp_path):
    blend = folder / "d.blend.yaml"
    sources = "sources: [{name: text, prefix: d, weight: 2, max_epochs: 3}]\n"
    blend.write_text(sources + "stages: [{until_tokens: 2T, weights: {text: 1}}]\n")
    shown = run(blend).stdout
    assert "text" in shown
    assert "stage 1, until 2,000,000,000,000 tokens: text 100.00%" in shown
    blend.write_text("sources: [{name: text, prefix: d, tokens: 5}]\n")
    assert "says text has 5 tokens, not" in run(blend, expect=1).stdout
    for ending in ("bin", "idx"):
        (tmp_path / f"d.{ending}").write_bytes((folder / f"d.{ending}").read_bytes()[:-2])
    assert "DAMAGED: " in run(tmp_path / "d", "--documents", "1", expect=1).stdout


def test_mistakes_are_one_sentence(folder):
    for arguments, message in (
        (["/nowhere"], "error: /nowhere.idx does not exist"),
        (["/nowhere.yaml"], "error: cannot read the blend file /nowhere.yaml"),
        ([folder / "d", "--documents", "7"], "has no document 7: it has 3, counted from 0"),
        ([folder / "d", "--tokenizer", "/nowhere"], "error: "),
        ([folder / "d", "--documents", "x"], "'x' must be numbers such as 3,17 or 5-8"),
    ):
        assert message in run(*arguments, expect=2).stderr
