"""What happens to the runs of the tests: each is submitted, disturbed, and lived with to its end.

Each takes a cluster of its own, the folder for the run and the prefix of the dataset.
"""

import time
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster
from tests.slurm.training import JobRun, default_site

MANY_STEPS, FEW_STEPS = 100, 30


def many_ends(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """2 nodes × 2 ranks: the time limit, then a job of higher priority, then a node without power.

    The first two save when they are told to; the third goes back to the last regular save.
    """
    run = JobRun(
        cluster,
        folder,
        prefix,
        {"checkpoint.save_interval": 10, "training.train_steps": MANY_STEPS},
    )
    run.fault("slow")
    run.submit()
    run.wait_for_step(3)
    run.move_limit(40)
    run.wait(lambda: len(run.ends()) == 1, "end by the time limit")
    run.restore_limit()
    run.wait_for_step(max(run.losses()) + 3)
    urgent = ["-p", "urgent", "-N", "4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"]
    cluster.run("sbatch", *urgent)
    run.wait(lambda: len(run.ends()) == 2, "end by preemption")
    run.wait_for_step(max(run.losses()) + 11)
    node = run.events("job_start")[-1]["nodes"][-1]
    cluster.kill_node(node)
    run.fault("slow", present=False)
    run.wait_for_end()
    run.notes["killed"] = node
    return run


def stop_and_corrupt(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """A person's stop; then the newest checkpoint is damaged and the run submitted again."""
    run = JobRun(
        cluster, folder, prefix, {"checkpoint.save_interval": 5, "training.train_steps": FEW_STEPS}
    )
    run.fault("slow")
    run.submit(nodes=1)
    run.wait_for_step(7)
    (folder / "stop").touch()
    run.wait_for_end()
    latest = folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()
    largest = max(latest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])
    run.fault("slow", present=False)
    run.submit(nodes=1)
    run.wait_for_end()
    return run


def cancelled(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """scancel, without any option."""
    run = JobRun(cluster, folder, prefix, {"training.train_steps": FEW_STEPS})
    run.fault("slow")
    run.submit(nodes=1)
    run.wait_for_step(2)
    cluster.run("scancel", str(run.jobs[0]))
    run.wait_for_end()
    run.wait(run.ends, "end in the ledger", 120)
    return run


def broken_rank(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """Rank 1 fails at its fourth step, and then at its first, at each start."""
    run = JobRun(cluster, folder, prefix, {}, {"max_failures": 2})
    run.fault("slow")
    run.submit(nodes=1)
    run.wait_for_step(3)
    run.fault("raise.1")
    broken = time.time()
    run.wait(run.ends, "end of the job")
    run.notes["seconds"] = str(run.events("job_end")[0]["time"] - broken)
    run.wait_for_end()
    return run


def broken_recipe(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """Between submission and start the code has changed: it no longer knows a field."""
    run = JobRun(cluster, folder, prefix, {})
    run.submit(nodes=1)
    recipe = folder / "slurm" / "config.yaml"
    recipe.write_text(recipe.read_text().replace("sequence_length:", "sequence_lenght:"))
    run.wait_for_end()
    return run


def chain(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """Three jobs that wait for one another; the first is told to save, the second ends the run."""
    run = JobRun(cluster, folder, prefix, {"training.train_steps": FEW_STEPS})
    run.fault("slow")
    run.submit("--chain", "3", nodes=1)
    first = run.jobs[0]
    run.wait_for_step(3)
    cluster.run("scancel", "--signal=USR1", str(first))
    run.wait(run.ends, "end of the first job")
    run.fault("slow", present=False)
    run.wait(lambda: len(run.ends()) == 2, "end of the second job")
    run.wait_for_end()
    run.notes |= {"first": run.state(first), "last": run.state()}
    return run


def site_with_a_full_disk() -> dict[str, Any]:
    """The nodes are checked, and n1 has no room."""
    site = default_site()
    site["node_check"] = {"count_gpus": False, "min_free_gb": 0.001}
    site["environment"]["SAMBA_TEST_FULL_DISK"] = "n1"
    return site


def bad_node_in_a_chain(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """The first of two jobs gets n1, the second does what there is to do."""
    site = site_with_a_full_disk()
    site["node_check"]["across"] = False
    run = JobRun(cluster, folder, prefix, {"training.train_steps": FEW_STEPS}, site)
    run.submit("--chain", "2", nodes=1)
    run.wait_for_end()
    run.notes["first"] = run.state(run.jobs[0])
    return run


def bad_node_then_hang(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """The check finds a full disk on n1; without it the run starts, and a rank hangs."""
    site = site_with_a_full_disk()
    fields = {"faults.hang_timeout_minutes": 0.4, "checkpoint.save_interval": 2}
    fields["training.train_steps"] = MANY_STEPS
    run = JobRun(cluster, folder, prefix, fields, site)
    run.fault("slow")
    run.submit(nodes=2, time_limit="30")  # near its limit the job does not check nodes again
    run.wait_for_step(3)
    run.fault("hang.2")
    run.wait(lambda: len(run.ends()) == 2, "end by the watchdog")
    run.fault("hang.2", present=False)
    run.fault("slow", present=False)
    run.wait_for_end()
    return run


def overtime(cluster: Cluster, folder: Path, prefix: str) -> JobRun:
    """A rank that does not hear the signal: the limit comes before anything is saved."""
    run = JobRun(cluster, folder, prefix, {"training.train_steps": FEW_STEPS})
    run.fault("slow")
    run.submit(nodes=1)
    run.wait_for_step(2)
    run.fault("hang.1")
    run.move_limit(100)
    run.wait(run.ends, "end by the time limit")
    run.restore_limit()
    run.fault("hang.1", present=False)
    run.fault("slow", present=False)
    run.wait_for_end()
    return run
