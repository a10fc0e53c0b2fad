"""What a job script asks at its start, after a check of the nodes, and at its end.

    lifecycle.py begin …  notes the start; refuses a crash loop and uneven nodes; lays out the ranks
    lifecycle.py nodes …  judges the reports of a check; excludes bad nodes, puts the job back
    lifecycle.py left …   prints the seconds until the ranks must have ended; nothing if no limit
    lifecycle.py end …    finds the cause of the end, decides what follows, does it

Each ends with 0 to go on, or with the code that the job script shall end with. What is found goes
to the run's ledger. Runs on the job's first node, outside of any container, with SIGTERM ignored:
the one that ends a job comes to all its processes.
"""

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.platform.exits import ExitCode  # noqa: E402
from samba_megatron.tracking import ledger  # noqa: E402
from samba_megatron.tracking.ledger import Cause  # noqa: E402
from slurm import evidence, history, scheduler  # noqa: E402
from slurm.decide import Decision, Finding, decide, find_cause  # noqa: E402
from slurm.history import Attempt  # noqa: E402
from slurm.placement import order_nodes  # noqa: E402

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What submit.py decided for all jobs of a run; it lies in the run folder."""

    job_name: str
    checkpoints: str
    """Folder of the run's checkpoints."""
    chain: bool
    """Whether the next job of a chain goes on, and not the same job again."""
    signal_minutes: float
    """Time between Slurm's signal and the limit."""
    gpus_per_node: int
    """And ranks."""
    pipeline_stages: int
    max_failures: int
    """Ends without a new checkpoint, in a row, after which the run is held."""

    @staticmethod
    def read(run_dir: Path) -> "Plan":
        """The plan of a run."""
        return Plan(**json.loads((run_dir / "slurm" / PLAN_FILE).read_text()))


def main() -> int:
    """Runs the command."""
    arguments = _parse()
    run_dir: Path = arguments.run
    plan = Plan.read(run_dir)
    if arguments.moment == "begin":
        return begin(run_dir, plan, arguments.hosts)
    if arguments.moment == "left":
        print(_seconds_left(plan))
        return ExitCode.DONE
    if arguments.moment == "nodes":
        return judge_nodes(run_dir, plan, arguments.reports, arguments.nodes.split(","))
    return end(run_dir, plan, arguments.code, arguments.logs)


def begin(run_dir: Path, plan: Plan, hosts: Path) -> int:
    """Notes the start of an attempt and the ends of those that were lost; lays out the ranks.

    Args:
        run_dir: the run's folder.
        plan: of the run.
        hosts: file to write the node of each rank into, by rank.
    """
    job, restart = history.this_attempt()
    # Of this script's own environment: slurmctld may be slow to answer.
    nodelist = os.environ["SLURM_JOB_NODELIST"]
    refuse_uneven_nodes(nodelist)
    fields = scheduler.job(job) or {}
    checkpoint = history.newest_checkpoint(Path(plan.checkpoints))
    nodes = scheduler.hostnames(nodelist)
    earlier = [node for attempt in history.attempts(run_dir) for node in attempt.nodes]
    dead = scheduler.dead_nodes(sorted({*earlier, *nodes}))
    history.settle_lost(run_dir, checkpoint, dead)
    order = order_nodes(nodes, plan.pipeline_stages, scheduler.leaf_switches())
    hosts.write_text("".join(f"{node}\n" * plan.gpus_per_node for node in order))
    ledger.append(
        run_dir,
        "job_start",
        nodes=nodes,
        nodelist=nodelist,
        partition=fields.get("Partition", ""),
        time_limit=fields.get("TimeLimit", ""),
        checkpoint=checkpoint,
        restart=restart,
    )
    row = history.failures_in_a_row(history.attempts(run_dir))
    if len(row) >= plan.max_failures:
        loop = _crash_loop(row)
        _note_end(run_dir, loop, None, Decision.HOLD, checkpoint, {})
        return _hold(run_dir, plan, loop) or ExitCode.FAILED
    print(f"[job] start {restart} of job {job} on {nodelist}, ", end="")
    print("from the beginning" if checkpoint < 0 else f"from the checkpoint of step {checkpoint}")
    return ExitCode.DONE


def _seconds_left(plan: Plan) -> int | str:
    """Until the job's limit, less what this script needs after the ranks; "" without a limit.

    A minute where Slurm does not answer: to be asked again then.
    """
    job, _ = history.this_attempt()
    fields = scheduler.job(job)
    if fields is None:
        return 60
    left = evidence.seconds_until(fields.get("EndTime", ""))
    return "" if left is None else int(left - min(60, 30 * plan.signal_minutes))


def refuse_uneven_nodes(nodelist: str) -> None:
    """One rank a GPU and the same number on every node: tensor parallelism lies within a node.

    Raises:
        UserError: the job is heterogeneous, or its nodes have different numbers of tasks.
    """
    if os.environ.get("SLURM_HET_SIZE"):
        raise UserError("this is a heterogeneous job: submit one with equal nodes (--nodes N)")
    tasks = os.environ.get("SLURM_TASKS_PER_NODE", "")
    if tasks and not re.fullmatch(r"\d+(\(x\d+\))?", tasks):
        raise UserError(
            f"the nodes {nodelist} have different numbers of GPUs ({tasks}): "
            "all must have the same; choose them with --partition or the site's constraint"
        )


def judge_nodes(run_dir: Path, plan: Plan, reports: Path, nodes: list[str]) -> int:
    """Reads the reports of a check; bad nodes are excluded and the job is put back.

    Returns:
        0 only if all are fit: a job of a chain must end too, and leave the run to the next one.
    """
    job, _ = history.this_attempt()
    is_running = (scheduler.job(job) or {}).get("JobState") == "RUNNING"
    # Where Slurm is ending the job, reports lack because the check was ended too.
    bad = read_reports(reports, nodes if is_running else [])
    if not bad:
        return ExitCode.DONE
    _note_bad(run_dir, bad)
    reason = "; ".join(f"{node}: {what}" for node, what in bad.items())
    code = ExitCode.BAD_NODE
    return _finish(run_dir, plan, Finding(Cause.BAD_NODE, reason), int(code), {}) or code


def read_reports(reports: Path, nodes: list[str]) -> dict[str, str]:
    """Nodes that failed the check, and those that gave no report while others did.

    Args:
        reports: folder with ``<node>.json`` and perhaps ``across.json``.
        nodes: those that were checked.
    """
    found = {path.stem: json.loads(path.read_text()) for path in reports.glob("*.json")}
    across = found.pop("across", {"ok": True})
    bad = {
        name: "; ".join(report["problems"]) or "the check failed"
        for name, report in found.items()
        if not report["ok"]
    }
    if found:
        bad |= {name: "gave no report of its check" for name in nodes if name not in found}
    if not across["ok"]:
        problems = "; ".join(across["problems"])
        bad |= {name: problems for name in across.get("nodes", []) if name not in bad}
    return bad


def _note_bad(run_dir: Path, bad: dict[str, str]) -> None:
    for node, what in bad.items():
        print(f"[job] {node} is excluded from now on: {what}", flush=True)
    ledger.append(run_dir, "bad_nodes", nodes=bad)


def end(run_dir: Path, plan: Plan, code: int, logs: Path) -> int:
    """Finds out why the training step ended, decides what follows and does it."""
    facts = evidence.gather(run_dir, logs, code, history.this_attempt(), 60 * plan.signal_minutes)
    code = facts.code
    finding = find_cause(facts)
    culprit = (facts.end or {}).get("bad_node")
    if finding.cause is Cause.BAD_NODE and culprit:
        _note_bad(run_dir, {culprit: finding.reason})
    extra: dict[str, Any] = {"dead_nodes": list(facts.dead_nodes)} if facts.dead_nodes else {}
    if code not in (ExitCode.DONE, ExitCode.REQUEUE) and facts.first is not None:
        extra["first_failure"] = vars(facts.first)
    return _finish(run_dir, plan, finding, code, extra)


def _finish(run_dir: Path, plan: Plan, finding: Finding, code: int, extra: dict[str, Any]) -> int:
    """Decides, writes the attempt's end into the ledger, and acts."""
    checkpoint = history.newest_checkpoint(Path(plan.checkpoints))
    row = _row_with_this_end(run_dir, finding.cause, checkpoint)
    decision = decide(finding.cause, code, len(row), plan.max_failures)
    print(f"[job] ended by {finding.cause}: {finding.reason}")
    _note_end(run_dir, finding, code, decision, checkpoint, extra)
    if decision is Decision.HOLD:
        is_loop = len(row) >= plan.max_failures
        return _hold(run_dir, plan, _crash_loop(row) if is_loop else finding)
    print(f"[job] {decision}", flush=True)
    if decision is Decision.REQUEUE:
        return _start_again(run_dir, plan)
    if plan.chain:
        for job in _others(plan):
            scheduler.cancel(job)
    return ExitCode.DONE


def _row_with_this_end(run_dir: Path, cause: Cause, checkpoint: int) -> list[Attempt]:
    """The ends without progress in a row, if this attempt ended now."""
    found = history.attempts(run_dir)
    if found:
        found[-1].ended, found[-1].cause, found[-1].last_checkpoint = 0.0, cause, checkpoint
    return history.failures_in_a_row(found)


def _note_end(
    run_dir: Path,
    finding: Finding,
    code: int | None,
    decision: Decision,
    checkpoint: int,
    extra: dict[str, Any],
) -> None:
    ledger.append(
        run_dir,
        "job_end",
        code=code,
        cause=finding.cause,
        reason=finding.reason,
        decision=decision,
        checkpoint=checkpoint,
        **extra,
    )


def _crash_loop(row: list[Attempt]) -> Finding:
    causes = ", ".join(str(attempt.cause) for attempt in reversed(row))
    reason = f"{len(row)} ends in a row without a new checkpoint ({causes}): a person must look"
    return Finding(Cause.CRASH_LOOP, reason)


def _hold(run_dir: Path, plan: Plan, why: Finding) -> int:
    """The run does not go on by itself; says why, and how it does after a person has looked."""
    ledger.append(run_dir, "hold", cause=why.cause, reason=why.reason)
    print(f"[job] hold: {why.reason}")
    print("[job] to go on after a look: scontrol release JOB if it is held, else submit again")
    sys.stdout.flush()
    if plan.chain:
        for job in _others(plan):
            scheduler.hold(job)
        return ExitCode.DONE
    return ExitCode.HOLD


def _others(plan: Plan) -> list[int]:
    """The waiting jobs of this run's chain."""
    me, _ = history.this_attempt()
    return [job.id for job in scheduler.queued(plan.job_name) if job.id != me]


def _start_again(run_dir: Path, plan: Plan) -> int:
    """Puts the job back into the queue, or leaves the run to the next job of the chain."""
    me, _ = history.this_attempt()
    exclude = sorted(history.bad_nodes(run_dir))
    if plan.chain:
        following = _others(plan)
        for job in following if exclude else []:
            scheduler.keep_off(job, exclude)
        if not following:
            print("[job] this was the last job of the chain: submit again to go on")
        return ExitCode.DONE
    sys.stdout.flush()
    try:
        if _comes_back_by_code(me, exclude):
            return ExitCode.REQUEUE
    except scheduler.SlurmError as error:
        print(f"[job] whether Slurm requeues by itself is not known: {error}", flush=True)
    try:
        # Also where Slurm is ending the job already, for its time: it would not come back.
        scheduler.requeue(me, exclude)
    except scheduler.SlurmError as error:
        print(f"[job] not requeued from here: {error}", flush=True)  # Slurm has done it itself
    return ExitCode.REQUEUE


def _comes_back_by_code(job: int, nodes: list[str]) -> bool:
    """Whether the site requeues code 75, and the job keeps off the nodes already."""
    fields = scheduler.job(job) or {}
    by_code = "75" in scheduler.setting("RequeueExit").split(",")
    if not by_code or fields.get("JobState") != "RUNNING":
        return False
    listed = fields.get("ExcNodeList", "")
    return set(nodes) <= set(scheduler.hostnames("" if listed == "(null)" else listed))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    moments = parser.add_subparsers(dest="moment", required=True)
    for name in ("begin", "nodes", "left", "end"):
        command = moments.add_parser(name)
        command.add_argument("--run", type=Path, required=True, help="the run's folder")
        if name == "begin":
            command.add_argument("--hosts", type=Path, required=True, help="file to write")
        if name == "nodes":
            command.add_argument("--reports", type=Path, required=True, help="of the check")
            command.add_argument("--nodes", required=True, help="names, with commas between")
        if name == "end":
            command.add_argument("--code", type=int, required=True, help="of the training step")
            command.add_argument("--logs", type=Path, required=True, help="of this attempt")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
