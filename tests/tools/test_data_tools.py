"""The data commands, from nothing to a dataset, and how they fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"{ROOT}/tools/{tool}.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 1 MB and a tokenizer, made by the commands."""
    path = tmp_path_factory.mktemp("tools")
    gathered = run("gather_corpus", "--output", path, "--max-megabytes", 1)
    assert "train.jsonl: " in gathered.stdout
    trained = run(
        *("train_tokenizer", "--input", path / "train.jsonl", "--vocab-size", 600),
        *("--output", path / "tokenizer"),
    )
    assert "600 tokens" in trained.stdout
    return path


def preprocess(folder: Path, *arguments: object, expect: int = 0):
    return run(
        *("preprocess_corpus", "--input", folder / "*.jsonl", "--tokenizer", folder / "tokenizer"),
        *("--output-prefix", folder / "dataset", "--workers", 2, *arguments),
        expect=expect,
    )


def test_from_nothing_to_a_dataset_and_again(folder):
    first = preprocess(folder)
    assert "documents" in first.stdout
    assert "gigatoken" in first.stdout
    for ending in ("bin", "idx", "manifest.json"):
        assert (folder / f"dataset.{ending}").stat().st_size > 0
    assert "is up to date" in preprocess(folder).stdout
    refused = preprocess(folder, "--no-append-eod", expect=2)
    assert refused.stderr.startswith("error: ")
    assert "append_eod was True, now False" in refused.stderr
    assert "documents" in preprocess(folder, "--no-append-eod", "--overwrite").stdout


def test_a_dry_run_names_sizes_and_time(folder):
    found = preprocess(folder, "--dry-run")
    for name in ("tokens, about", "time, about", "gigatoken"):
        assert name in found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shard-size", "0.1"), "--shard-size must be at least 1 MB"),
        (("--validation-fraction", "1.5"), "--validation-fraction 1.5: give a part below 1"),
        (("--stages", "/nowhere.yaml"), "cannot read the stages /nowhere.yaml"),
        (("--stages", "/nowhere.yaml", "--c4"), "leave out the flags of single stages"),
        (("--verify", "--engine", "huggingface"), "--verify compares gigatoken"),
        (("--text-key", "body", "--overwrite"), "no text under the key: name the key"),
    ],
)
def test_mistaken_options_are_one_sentence(folder, arguments, message):
    refused = preprocess(folder, *arguments, expect=2)
    assert message in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_skipped_lines_are_listed(folder, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "fine"}\n{"text": \n')
    common = ("--input", source, "--tokenizer", folder / "tokenizer", "--output-prefix")
    failed = run("preprocess_corpus", *common, tmp_path / "d", expect=2)
    assert "a.jsonl:2: malformed JSON" in failed.stderr
    passed = run("preprocess_corpus", *common, tmp_path / "d", "--on-error", "skip")
    assert "a.jsonl:2: malformed JSON" in passed.stdout
    assert "skipped: malformed JSON" in passed.stdout


def test_mistakes_are_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for tool, arguments in {
        "gather_corpus": ("--output", tmp_path / "file"),
        "train_tokenizer": ("--input", "/nowhere.jsonl", "--output", tmp_path),
        "preprocess_corpus": ("--input", "/nowhere", "--tokenizer", "t", "--output-prefix", "p"),
    }.items():
        result = run(tool, *arguments, expect=2)
        assert result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


def test_a_vocabulary_the_text_cannot_fill_is_a_warning(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "abc abc"}\n')
    arguments = ("--input", source, "--vocab-size", 5000, "--output", tmp_path / "tokenizer")
    result = run("train_tokenizer", *arguments)
    assert "warning: the text has too few repeated pairs for 5000 tokens" in result.stderr
