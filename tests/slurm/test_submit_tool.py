"""A tool as a job of a real Slurm: what a user types, and what comes out of it."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from samba_megatron.data.tokenizer import train_tokenizer
from tests.distributed.toy import ROOT
from tests.slurm.cluster import Cluster

TEXTS = [f"Document {number} says what is to be said of {number * 37}." for number in range(200)]


def preprocess(folder: Path, prefix: str) -> list[str]:
    """Arguments of the tool, with relative paths; the corpus and tokenizer they name."""
    (folder / "my corpus").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (folder / "my corpus" / "all.jsonl").write_text(lines)
    train_tokenizer(iter(TEXTS), 300, folder / "tokenizer", False)
    return ["--input", "my corpus/*.jsonl", "--tokenizer", "tokenizer", "--output-prefix", prefix]


@pytest.mark.slurm
@pytest.mark.timeout(300)
def test_a_corpus_is_tokenized_by_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """The job starts where the user is, in folders whose names have spaces."""
    rest = preprocess(tmp_path, "data/train")
    command = [sys.executable, str(ROOT / "slurm" / "submit_tool.py"), "preprocess"]
    command += ["--time", "5", "--cpus", "1", "--job-dir", "a job", "--", *rest]
    result = subprocess.run(
        command, env=cluster.env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    job = re.search(r"submitted job (\d+)", result.stdout)
    assert job
    deadline = time.monotonic() + 120
    while "JobState=COMPLETED" not in cluster.run("scontrol", "show", "job", "-o", job[1]):
        log = tmp_path / "a job" / "logs" / f"{job[1]}.log"
        said = log.read_text() if log.exists() else "the job has no log"
        assert time.monotonic() < deadline, said
        time.sleep(0.3)
    manifest = json.loads((tmp_path / "data" / "train.manifest.json").read_text())
    assert str(len(TEXTS)) in json.dumps(manifest)
    assert (tmp_path / "data" / "train.bin").stat().st_size > 0


def test_mistakes(tmp_path: Path) -> None:
    for options, words in (
        (["convert", "--time", "1h", "--job-dir", str(tmp_path)], "--time '1h'"),
        (["convrt", "--time", "1", "--job-dir", str(tmp_path)], "invalid choice: 'convrt'"),
    ):
        command = [sys.executable, str(ROOT / "slurm" / "submit_tool.py"), *options]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
