"""Lets a toy run live on a private Slurm under random faults, and shows that it ends as if alone.

    python tools/soak.py --minutes 30 --output soak

Needs Slurm's daemons on this machine (slurm-wlm, munge) and, as a rule, root. The run is submitted
twice: undisturbed, and with ranks killed, nodes losing their power, jobs of higher priority and
signals at random moments. The losses of the two must be equal to the last bit, step by step.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402

if TYPE_CHECKING:
    from tests.slurm.cluster import Cluster
    from tests.slurm.training import JobRun

STEPS_A_MINUTE = 60
FAULTS = ("rank killed", "node lost", "preemption", "signal")


def main() -> None:
    """Runs both and compares."""
    arguments = _parse()
    from tests.distributed.toy import write_dataset
    from tests.slurm.cluster import Cluster, missing_commands

    missing = missing_commands()
    if missing:
        raise UserError(f"{', '.join(missing)} not found: apt-get install slurm-wlm munge")
    arguments.output.mkdir(parents=True)
    prefix = write_dataset(arguments.output.absolute())
    with Cluster().start() as cluster:
        undisturbed = _new_run(cluster, arguments, "undisturbed", prefix)
        print("undisturbed run …", flush=True)
        undisturbed.submit()
        undisturbed.wait_for_end(3600)
        run = _new_run(cluster, arguments, "disturbed", prefix)
        run.submit()
        chance, counts = random.Random(arguments.seed), Counter[str]()
        end = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < end and _wait_for_a_new_step(run):
            time.sleep(chance.uniform(0, arguments.longest_wait))
            fault = chance.choice(FAULTS)
            if run.state() == "RUNNING" and _disturb(run, fault, chance):
                counts[fault] += 1
                print(f"{sum(counts.values())}: {fault} after step {max(run.losses())}", flush=True)
        run.wait_for_end(3600)
    _report(undisturbed, run, counts, arguments.output)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="time under faults")
    parser.add_argument("--output", type=Path, required=True, help="folder that is not there yet")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--longest-wait", type=float, default=10, help="seconds after a step")
    arguments = parser.parse_args()
    if arguments.output.exists():
        raise UserError(f"--output {arguments.output} is there already: name a new folder")
    return arguments


def _new_run(cluster: "Cluster", arguments: argparse.Namespace, name: str, prefix: str) -> "JobRun":
    from tests.slurm.training import JobRun

    fields = {
        "training.train_steps": max(int(STEPS_A_MINUTE * arguments.minutes), 1),
        "checkpoint.save_interval": 5,
    }
    # A fault may come before the first save of a start, again and again: that is no crash loop.
    site = {"max_failures": 10_000}
    return JobRun(cluster, arguments.output.absolute() / name, prefix, fields, site)


def _wait_for_a_new_step(run: "JobRun") -> bool:
    """Waits until the run does a step; false if it has ended."""
    from tests.slurm.training import OVER

    path = run.folder / "metrics.jsonl"

    def steps() -> int:
        return path.read_bytes().count(b'"train"') if path.exists() else 0

    before = steps()
    run.wait(lambda: steps() > before or run.state() in OVER, "new step")
    return steps() > before


def _disturb(run: "JobRun", fault: str, chance: random.Random) -> bool:
    """Does it; false if there was nothing to do it to any more."""
    job = run.jobs[-1]
    if fault == "rank killed":
        ranks = run.cluster.job_processes(job)
        if not ranks:
            return False
        os.kill(chance.choice(ranks), signal.SIGKILL)
    elif fault == "node lost":
        node = chance.choice(run.events("job_start")[-1]["nodes"])
        run.cluster.kill_node(node)
        starts = len(run.events("job_start"))
        run.wait(lambda: len(run.events("job_start")) > starts, "start without the node")
        run.cluster.start_node(node)
    elif fault == "preemption":
        wanted = ["-p", "urgent", "-N", "4", "--exclusive", "--output=/dev/null"]
        run.cluster.run("sbatch", *wanted, "--wrap=sleep 2")
    else:
        run.cluster.run("scancel", "--signal=USR1", str(job))
    return True


def _report(undisturbed: "JobRun", run: "JobRun", counts: Counter[str], output: Path) -> None:
    """Prints what was survived.

    Raises:
        UserError: naming the first step that differs.
    """
    expected, found = undisturbed.losses(), run.losses()
    for step, loss in expected.items():
        if found.get(step) != loss:
            raise UserError(f"step {step}: loss {loss} undisturbed, {found.get(step)} disturbed")
    causes = Counter(cause for cause, _ in run.ends())
    (output / "soak.json").write_text(json.dumps({"faults": counts, "causes": causes}, indent=1))
    print(f"faults: {', '.join(f'{number} × {name}' for name, number in sorted(counts.items()))}")
    print(f"ends:   {', '.join(f'{number} × {name}' for name, number in sorted(causes.items()))}")
    print(f"{sum(counts.values())} faults survived: all {len(expected)} losses equal, bit for bit")


if __name__ == "__main__":
    run_command(main)
