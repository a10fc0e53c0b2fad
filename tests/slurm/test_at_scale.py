"""The shipped templates on 1,024 nodes × 8 GPUs, asked of a Slurm that has them on paper."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.toy import ROOT, write_dataset
from tests.slurm.cluster import ControllerOnly

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data"))


def call(
    cluster: ControllerOnly, program: str, *options: object
) -> "subprocess.CompletedProcess[str]":
    """Runs one of the commands in slurm/ against the cluster."""
    command = [sys.executable, str(ROOT / "slurm" / program), *map(str, options)]
    return subprocess.run(command, env=cluster.env, capture_output=True, text=True)


def submit(
    cluster: ControllerOnly, folder: Path, prefix: str, *options: object
) -> "subprocess.CompletedProcess[str]":
    """Submits samba_421m to all nodes."""
    site = folder.with_name("site.yaml")
    site.write_text(json.dumps({"shared_paths": [str(folder.parent), str(Path(prefix).parent)]}))
    fixed: list[Any] = ["--config", "samba_421m", "--nodes", 1024, "--time", "24:00:00"]
    fixed += ["--run-dir", folder, "--site", site, "--until-tokens", "20B"]
    fixed += ["--data.data_path", prefix, "--data.split", "98,2,0"]
    fixed += ["--training.micro_batch_size", 1, "--training.global_batch_size", 8192]
    fixed += ["--checkpoint.keep_last", "1"]
    return call(cluster, "submit.py", *fixed, *options)


def test_pretraining_is_scheduled(
    paper_cluster: ControllerOnly, tmp_path: Path, prefix: str
) -> None:
    """submit.py's own --test-only, and its job in the queue with the nodes and GPUs asked for.

    The folder's name has a space. A second submission to it changes nothing.
    """
    folder = tmp_path / "a run"
    script = submit(paper_cluster, folder, prefix, "--dry-run").stdout
    assert "#SBATCH --dependency=singleton\n" in script
    result = submit(paper_cluster, folder, prefix)
    assert result.returncode == 0, result.stderr
    assert "on nodes n[1-1024] in partition main" in result.stdout
    job = re.search(r"submitted job (\d+)", result.stdout)
    assert job
    fields = paper_cluster.run("scontrol", "show", "job", "-o", job[1])
    for words in (
        "NumNodes=1024",
        "NumTasks=8192",
        "Requeue=1",
        "gres:gpu:8",
        "OverSubscribe=NO",
        f"StdOut={folder}/logs/job_{job[1]}.log",
    ):
        assert words in fields, fields
    config = folder / "slurm" / "config.yaml"
    before = config.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for same in (folder, link):
        again = submit(paper_cluster, same, prefix, "--name", "other", "--training.seed", 7)
        assert again.returncode == 2 and f"has job {job[1]} in the queue" in again.stderr
    assert config.read_bytes() == before
    paper_cluster.run("scancel", job[1])


def test_a_chain_is_as_long_as_asked(
    paper_cluster: ControllerOnly, tmp_path: Path, prefix: str
) -> None:
    result = submit(paper_cluster, tmp_path / "run", prefix, "--chain", 4)
    assert result.returncode == 0, result.stderr
    jobs = re.search(r"submitted job ([\d ]+)", result.stdout)
    assert jobs and len(jobs[1].split()) == 4
    for job in jobs[1].split():
        assert "Requeue=0" in paper_cluster.run("scontrol", "show", "job", "-o", job)
        paper_cluster.run("scancel", job)


def test_what_cannot_be_scheduled_is_refused(
    paper_cluster: ControllerOnly, tmp_path: Path, prefix: str
) -> None:
    """More nodes than there are; all of them under one leaf switch; more GPUs than a node has."""
    site = {"shared_paths": ["/"], "sbatch_options": ["--switches=1"]}
    one_switch = tmp_path / "one_switch.yaml"
    one_switch.write_text(json.dumps(site))
    for options, words in (
        (("--nodes", 1025, "--training.global_batch_size", 8200), "--nodes"),
        (("--nodes", 512, "--site", one_switch), "would refuse"),
        (("--gpus-per-node", 16, "--training.global_batch_size", 16384), "--gpus-per-node"),
        (("--partition", "gpuu"), "no partition gpuu on this cluster: use --partition main"),
    ):
        result = submit(paper_cluster, tmp_path / "run", prefix, *options)
        assert result.returncode == 2, (options, result.stdout, result.stderr)
        assert words in result.stderr and result.stderr.count("error: ") == 1, result.stderr


def test_tools_are_scheduled(paper_cluster: ControllerOnly, tmp_path: Path) -> None:
    for tool in ("preprocess", "convert"):
        fixed = ["--time", "04:00:00", "--job-dir", tmp_path / tool]
        result = call(paper_cluster, "submit_tool.py", tool, *fixed, "--", "--help")
        assert result.returncode == 0, result.stderr
        assert "submitted job" in result.stdout
