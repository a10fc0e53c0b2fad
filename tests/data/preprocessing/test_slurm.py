"""The same pipeline as an array of jobs on a real Slurm gives the bytes of the local run."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def cluster():
    """Four simulated nodes."""
    with Cluster(nodes=4).start() as running:
        yield running


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory) -> Path:
    """6 MB of text with one line that is no JSON, in the second shard."""
    path = tmp_path_factory.mktemp("source") / "text.jsonl"
    content = (corpus / "train.jsonl").read_bytes()
    path.write_bytes(content + b'{"text": \n' + content)
    return path


def run_on(cluster: Cluster, source: Path, tokenizer: Path, prefix: Path, *more: str):
    """Runs the command as a user on a login node does."""
    command = [sys.executable, str(ROOT / "tools" / "preprocess_corpus.py"), "--input", str(source)]
    command += ["--tokenizer", str(tokenizer), "--output-prefix", str(prefix), "--shard-size", "2"]
    command += ["--slurm", "--slurm-time", "10", "--slurm-memory", "1", "--workers", "4", *more]
    return subprocess.run(command, capture_output=True, text=True, env=cluster.env)


def test_an_array_of_jobs_makes_the_bytes_of_a_local_run(
    cluster, source, tokenizer_folder, tmp_path
):
    options = PreprocessOptions(
        [str(source)],
        str(tokenizer_folder),
        str(tmp_path / "local" / "text"),
        shard_bytes=2_000_000,
        on_error="skip",
    )
    local = preprocess(options)
    assert local.shards == 4
    prefix = tmp_path / "slurm" / "text"
    failed = run_on(cluster, source, tokenizer_folder, prefix)
    assert failed.returncode == 2, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "malformed JSON" in failed.stderr
    done = run_on(cluster, source, tokenizer_folder, prefix, "--on-error", "skip")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of these done before" in done.stdout
    for path in (tmp_path / "local").iterdir():
        if path.suffix in (".bin", ".idx", ".yaml"):
            assert (prefix.parent / path.name).read_bytes() == path.read_bytes()
    assert not Path(f"{prefix}.preprocess").exists()
    again = preprocess(replace(options, output_prefix=str(prefix)))
    assert again.up_to_date
