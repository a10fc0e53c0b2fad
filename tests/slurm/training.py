"""Toy runs as real jobs of the private cluster: submitted as a user does, watched, disturbed."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from samba_megatron.tracking import ledger
from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import ROOT, toy_config
from tests.slurm.cluster import Cluster

RANKS_PER_NODE = 2
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "SPECIAL_EXIT")
"""States of a job that does not come back by itself."""
HERE = Path(__file__).parent


class JobRun:
    """One run in a folder of its own.

    Args:
        cluster: where its jobs go.
        folder: the run's, not yet there.
        prefix: of the dataset.
        fields: of the run's configuration, over the toy's.
        site: settings of the site's file over the tests' own.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        prefix: str,
        fields: dict[str, Any],
        site: dict[str, Any] | None = None,
    ) -> None:
        self.cluster, self.folder = cluster, folder
        self.jobs: list[int] = []
        self.notes: dict[str, str] = {}
        self.faults = folder.with_name(f"{folder.name}_faults")
        self.faults.mkdir()
        settings = default_site() | (site or {})
        settings["shared_paths"] = [str(folder.parent), str(Path(prefix).parent)]
        shutil.copy(HERE / "faulty_ranks.py", self.faults / "sitecustomize.py")
        settings["environment"]["PYTHONPATH"] = str(self.faults)
        self.site = folder.with_name(f"{folder.name}_site.yaml")
        self.site.write_text(yaml.safe_dump(settings))
        self.config = toy_config(prefix, folder, **fields)
        self.config.pop("run_dir")

    def submit(self, *options: str, nodes: int = 2, time_limit: str = "10") -> str:
        """Submits the run with ``slurm/submit.py``; returns what that printed."""
        result = self.try_to_submit(*options, nodes=nodes, time_limit=time_limit)
        assert result.returncode == 0, result.stderr
        self.jobs += self.events("submitted")[-1]["jobs"]
        return result.stdout

    def try_to_submit(
        self, *options: str, nodes: int = 2, time_limit: str = "10"
    ) -> "subprocess.CompletedProcess[str]":
        """The same; it may fail."""
        command = [sys.executable, str(ROOT / "slurm" / "submit.py"), "--config", "samba_tiny"]
        command += ["--nodes", str(nodes), "--time", time_limit, "--run-dir", str(self.folder)]
        command += ["--site", str(self.site), *options, "--training.train_tokens", "null"]
        for name, value in self.config.items():
            command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return subprocess.run(command, env=self.cluster.env, capture_output=True, text=True)

    def fault(self, name: str, present: bool = True) -> None:
        """Switches a fault of ``faulty_ranks.py`` on or off: ``slow``, ``hang.3``, …"""
        if present:
            (self.faults / name).touch()
        else:
            (self.faults / name).unlink(missing_ok=True)

    def move_limit(self, seconds: int) -> None:
        """The newest job's limit is so many seconds from now, however long it took to start.

        Limit and signal are Slurm's own; only that they come early is not a user's day.
        """
        end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds))
        self.cluster.run("scontrol", "update", f"jobid={self.jobs[-1]}", f"EndTime={end}")

    def restore_limit(self) -> None:
        """The newest job has the ten minutes again that it was submitted with."""
        self.cluster.run("scontrol", "update", f"jobid={self.jobs[-1]}", "TimeLimit=10")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the run's ledger."""
        return ledger.read(self.folder, kind)

    def ends(self) -> list[tuple[str, str]]:
        """(cause, decision) of each end of a job."""
        return [(record["cause"], record["decision"]) for record in self.events("job_end")]

    def losses(self) -> dict[int, float]:
        """The training losses by step."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return {}
        return {record["step"]: record["loss"] for record in read_metrics(path, "train")}

    def state(self, job: int | None = None) -> str:
        """What Slurm says of a job, the newest if none is named: PENDING, RUNNING, COMPLETED, …"""
        text = self.cluster.run("scontrol", "show", "job", "-o", str(job or self.jobs[-1]))
        return text.partition("JobState=")[2].split()[0]

    def wait(self, ready: Callable[[], object], what: str, seconds: float = 600) -> None:
        """Waits until something is so."""
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s\n{self.report()}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        """Waits until the run has done a step."""
        self.wait(lambda: max(self.losses(), default=0) >= step, f"step {step}")

    def wait_for_end(self, seconds: float = 600) -> None:
        """Waits until the newest job has left the queue for good."""
        self.wait(lambda: self.state() in OVER, "end", seconds)

    def report(self) -> str:
        """The job's log and ledger, for an error."""
        files = [self.folder / ledger.FILE_NAME, *sorted(self.folder.glob("logs/*.log"))]
        files += sorted(self.folder.glob("logs/*/rank_*.log"))
        texts = [f"--- {file}\n{file.read_text()[-3000:]}" for file in files if file.exists()]
        return "\n".join([*texts, self.cluster.run("squeue", check=False)])


def default_site() -> dict[str, Any]:
    """A site as small as the tests want it: no check of the nodes, a signal soon before the end."""
    return {
        "gpus_per_node": RANKS_PER_NODE,
        "signal_minutes": 0.25,
        "environment": {"OMP_NUM_THREADS": 1},
        "node_check": {"enabled": False, "count_gpus": False},
    }
