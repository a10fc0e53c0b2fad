"""What the job script asks: refusals that must end the job, and a Slurm that is silent.

A controller without nodes answers; the jobs are not known to it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking import ledger
from slurm import scheduler
from slurm.lifecycle import PLAN_FILE
from tests.distributed.toy import ROOT
from tests.slurm.cluster import ControllerOnly


def write_plan(run: Path, chain: bool) -> None:
    plan: dict[str, Any] = {"job_name": "toy", "checkpoints": str(run / "checkpoints")}
    plan |= {"chain": chain, "signal_minutes": 10, "gpus_per_node": 2, "pipeline_stages": 1}
    plan["max_failures"] = 3
    (run / "slurm").mkdir()
    (run / "slurm" / PLAN_FILE).write_text(json.dumps(plan))


def ask(
    moment: str, run: Path, *options: object, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Runs lifecycle.py in a job."""
    command = [sys.executable, str(ROOT / "slurm" / "lifecycle.py"), moment, "--run", str(run)]
    env = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", **variables}
    return subprocess.run(
        [*command, *map(str, options)], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slurm
@pytest.mark.parametrize(("chain", "code"), [(True, ExitCode.FAILED), (False, ExitCode.HOLD)])
def test_a_crash_loop_does_not_start(
    paper_cluster: ControllerOnly, tmp_path: Path, chain: bool, code: ExitCode
) -> None:
    write_plan(tmp_path, chain)
    for restart in range(3):
        ledger.append(tmp_path, "job_start", job=7, restart=restart, nodes=["n1"], checkpoint=-1)
        end = {"cause": "bug", "decision": "requeue", "checkpoint": -1}
        ledger.append(tmp_path, "job_end", job=7, restart=restart, **end)
    result = ask("begin", tmp_path, "--hosts", tmp_path / "hosts", **paper_cluster.env)
    assert result.returncode == code, result.stdout + result.stderr
    (hold,) = ledger.read(tmp_path, "hold")
    assert hold["cause"] == "crash loop" and "3 ends in a row" in hold["reason"]
    assert [record["cause"] for record in ledger.read(tmp_path, "job_end")][-1] == "crash loop"


@pytest.mark.slurm
def test_a_job_that_slurm_does_not_tell_of_starts(
    paper_cluster: ControllerOnly, tmp_path: Path
) -> None:
    """Its nodes are in its environment; its end is asked for again in a minute."""
    write_plan(tmp_path, chain=False)
    result = ask("begin", tmp_path, "--hosts", tmp_path / "hosts", **paper_cluster.env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "hosts").read_text() == "n1\nn1\nn2\nn2\n"
    assert ask("left", tmp_path, **paper_cluster.env).stdout == "60\n"


@pytest.mark.slurm
def test_a_job_of_a_chain_ends_where_a_node_is_bad(
    paper_cluster: ControllerOnly, tmp_path: Path
) -> None:
    write_plan(tmp_path, chain=True)
    ledger.append(tmp_path, "job_start", job=77, restart=0, nodes=["n1", "n2"], checkpoint=-1)
    reports = tmp_path / "reports"
    reports.mkdir()
    (reports / "n2.json").write_text(json.dumps({"ok": False, "problems": ["no room"]}))
    options = ("--reports", reports, "--nodes", "n1,n2")
    result = ask("nodes", tmp_path, *options, **paper_cluster.env)
    assert result.returncode == ExitCode.BAD_NODE, result.stdout + result.stderr
    assert ledger.read(tmp_path, "bad_nodes")[0]["nodes"] == {"n2": "no room"}


def test_without_an_answer_no_node_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert scheduler.dead_nodes(["n1"]) == {}
