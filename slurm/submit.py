"""Submits a pretraining run: checks it, writes its job script, hands it to Slurm.

    python slurm/submit.py --config samba_3.8b --nodes 128 --time 24:00:00 --until-tokens 3.2T \
        --run-dir /scratch/me/run --data.data_path '[/scratch/me/corpus/train]'

Options with a dot are laid over the recipe, as with pretrain_samba.py. The run goes on by itself
until its tokens are done; docs/slurm.md says how. --dry-run prints all and submits nothing.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.config import RunConfig  # noqa: E402
from samba_megatron.config.load import parse_run_config, to_yaml  # noqa: E402
from samba_megatron.config.rules.run import weight_of  # noqa: E402
from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.platform.files import write_text  # noqa: E402
from samba_megatron.tracking import ledger  # noqa: E402
from slurm import checks, history, render, scheduler  # noqa: E402
from slurm.lifecycle import PLAN_FILE, Plan  # noqa: E402
from slurm.site_settings import Site, load_site  # noqa: E402


class Request(NamedTuple):
    """All that decides a submission."""

    arguments: argparse.Namespace
    site: Site
    config: RunConfig
    """With its folders filled in."""
    run_dir: Path
    plan: Plan
    exclude: list[str]
    """Nodes that an earlier job of the run found bad."""


def main() -> None:
    """Runs the command."""
    request = _request(*_parse(sys.argv[1:]))
    remarks = check(request)
    script = job_script(request)
    if request.arguments.dry_run:
        _print_all(request, script, remarks)
        return
    for remark in remarks:
        print(remark)
    _refuse_second(request)  # before anything that a running job reads is written
    path = write_run_folder(request, script)
    count = request.arguments.chain if request.plan.chain else 1
    print(f"sbatch --test-only: {scheduler.test(str(path))}")
    jobs = [scheduler.submit(str(path)) for _ in range(count)]
    ledger.append(request.run_dir, "submitted", jobs=jobs, command=sys.argv[1:])
    print(f"submitted job {' '.join(map(str, jobs))}\n")
    print(_what_next(request, str(jobs[0])))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, options of the run)."""
    parser = argparse.ArgumentParser(
        usage="submit.py --config RECIPE --nodes N --time 24:00:00 --run-dir DIR [options] "
        "[--GROUP.FIELD VALUE ...]",
        description=__doc__.split("\n\n")[0],
        epilog="Options with a dot are the run's: pretrain_samba.py --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], required=True, help="recipe; may be repeated")
    add("--nodes", type=int, required=True, help="number of nodes")
    add("--gpus-per-node", type=int, help="GPUs of each; the site's number, else 8")
    add("--run-dir", type=Path, required=True, help="folder of the run, on a shared file system")
    add("--until-tokens", help="length of the whole run, as 3.2T, over all its jobs")
    render.add_allocation(add)
    add("--container", help="image, instead of the site's")
    add("--exclude", help="nodes to keep off, with commas between")
    add("--site", type=Path, help="the cluster's settings; else the file that SAMBA_SITE names")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--requeue", action="store_true", help="the same job again until done")
    way.add_argument("--chain", type=int, metavar="N", help="N jobs that wait for one another")
    add("--signal-minutes", type=float, help="save so long before the limit; else the site's")
    add("--max-failures", type=int, help="hold after so many ends without a new checkpoint")
    add("--forgive-bad-nodes", action="store_true", help="use again what earlier jobs excluded")
    add("--dry-run", action="store_true", help="check, print everything, submit nothing")
    return parser.parse_known_args(argv)


def _request(arguments: argparse.Namespace, overrides: list[str]) -> Request:
    """Joins the command line, the site and the recipe."""
    site = load_site(arguments.site)
    arguments.gpus_per_node = arguments.gpus_per_node or site.gpus_per_node
    for name, number in (("nodes", arguments.nodes), ("gpus-per-node", arguments.gpus_per_node)):
        if number < 1:
            raise UserError(f"--{name} is {number}: it must be 1 or more")
    is_chain = arguments.chain is not None or (site.restart == "chain" and not arguments.requeue)
    if is_chain:
        arguments.chain = site.chain_length if arguments.chain is None else arguments.chain
        if arguments.chain < 1:
            raise UserError(f"--chain is {arguments.chain}: it must be 1 or more jobs")
    run_dir = arguments.run_dir.absolute()
    config = _config(arguments, overrides, run_dir)
    plan = Plan(
        job_name=_job_name(run_dir),
        checkpoints=str(config.checkpoint.save),
        chain=is_chain,
        signal_minutes=arguments.signal_minutes or site.signal_minutes,
        gpus_per_node=arguments.gpus_per_node,
        pipeline_stages=config.parallel.pipeline_model_parallel_size,
        max_failures=arguments.max_failures or site.max_failures,
    )
    bad = [] if arguments.forgive_bad_nodes else sorted(history.bad_nodes(run_dir))
    named = (arguments.exclude or "").split(",") if arguments.exclude else []
    return Request(arguments, site, config, run_dir, plan, sorted({*bad, *named}))


def _job_name(run_dir: Path) -> str:
    """Of the run's folder alone, whatever path leads to it: no two jobs of one name run at once."""
    folder = run_dir.resolve()
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name)
    return f"{readable}-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"


def _config(arguments: argparse.Namespace, overrides: list[str], run_dir: Path) -> RunConfig:
    """The run's configuration with whole paths, as every node will read it."""
    argv = [word for recipe in arguments.config for word in ("--config", recipe)]
    argv += [*overrides, "--run_dir", str(run_dir)]
    if arguments.until_tokens:
        argv += ["--training.train_tokens", arguments.until_tokens]
        argv += ["--training.train_steps", "null"]
    config = parse_run_config(argv, prog="submit.py")
    data, checkpoint = config.data, config.checkpoint
    return dataclasses.replace(
        config,
        checkpoint=dataclasses.replace(
            checkpoint,
            save=_whole(checkpoint.save or run_dir / "checkpoints"),
            load=_whole(checkpoint.load) if checkpoint.load else None,
        ),
        data=dataclasses.replace(
            data,
            path_to_cache=_whole(data.path_to_cache or run_dir / "index_cache"),
            data_path=_entries(data.data_path),
            blend_file=[_whole(file) for file in data.blend_file],
            valid_data_path=_entries(data.valid_data_path),
            tokenizer=_whole(data.tokenizer) if data.tokenizer else None,
        ),
    )


def _entries(paths: list[str]) -> list[str]:
    """Whole paths; weights between them stay as they are."""
    return [path if weight_of(path) is not None else _whole(path) for path in paths]


def _whole(path: str | Path) -> str:
    """From the root, as jobs start in another folder."""
    return str(Path(path).absolute())


def check(request: Request) -> list[str]:
    """Everything that can be checked without the job; remarks for people.

    Raises:
        UserError: what is wrong, in one sentence.
    """
    arguments, config, site = request.arguments, request.config, request.site
    checks.time_limit(arguments.time, request.plan.signal_minutes)
    checks.layout(config, arguments.nodes, arguments.gpus_per_node)
    checks.container(site, arguments.container)
    checks.paths(config, request.run_dir, site)
    ranks = arguments.nodes * arguments.gpus_per_node
    remarks = [f"memory: {checks.memory(config, ranks, site.gpu_memory_gib)}"]
    remarks.append(f"disk: {checks.disk(config)}")
    notes = [checks.maybe_local(request.run_dir, site), *checks.tokenizer_remarks(config)]
    remarks += [f"note: {text}" for text in notes if text]
    if request.exclude:
        remarks.append(f"excluded nodes: {', '.join(request.exclude)}")
    if scheduler.is_here():
        partition = render.allocation(arguments, site)["partition"]
        checks.cluster(partition, arguments.gpus_per_node)
    elif not arguments.dry_run:
        scheduler.ask("sbatch", "--version")
    else:
        remarks.append("note: there is no Slurm on this machine: the cluster was not asked")
    return remarks


def job_script(request: Request) -> str:
    """The filled-in template."""
    arguments, site, plan = request.arguments, request.site, request.plan
    gpus, cpus = arguments.gpus_per_node, site.cpus_per_gpu
    options: dict[str, Any] = {
        "job-name": plan.job_name,
        "nodes": arguments.nodes,
        "ntasks-per-node": gpus,
        "gpus-per-node": gpus,
        "cpus-per-task": cpus,
        "exclusive": "",
        **render.allocation(arguments, site),
        "exclude": ",".join(request.exclude) or None,
        "signal": f"USR1@{round(60 * plan.signal_minutes)}",
        "no-requeue" if plan.chain else "requeue": "",
        # One job of a run at a time: of a user's jobs of one name, which the run's folder gives.
        "dependency": "singleton",
        "open-mode": "append",
        "output": request.run_dir / "logs" / "job_%j.log",
    }
    return render.fill(
        "pretrain",
        {
            "directives": render.directives(options, site),
            **render.places(site, render.ROOT, request.run_dir, arguments.container),
            "run_dir": shlex.quote(str(request.run_dir)),
            "host_python": shlex.quote(sys.executable),
            "gpus_per_node": str(gpus),
            "node_check": render.node_check(site),
        },
    )


def write_run_folder(request: Request, script: str) -> Path:
    """Writes the job script, the resolved configuration and the plan; returns the script."""
    folder = request.run_dir / "slurm"
    (request.run_dir / "logs").mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    plan = json.dumps(dataclasses.asdict(request.plan), indent=1) + "\n"
    files = {"config.yaml": to_yaml(request.config), PLAN_FILE: plan, "pretrain.sbatch": script}
    for name, text in files.items():
        write_text(folder / name, text)
    if request.arguments.forgive_bad_nodes:
        ledger.append(request.run_dir, "bad_nodes_forgiven")
    return folder / "pretrain.sbatch"


def _refuse_second(request: Request) -> None:
    """Two jobs in one run folder would wait for each other; a chain may be made longer."""
    present = scheduler.queued(request.plan.job_name)
    if present and not request.plan.chain:
        raise UserError(
            f"the run in {request.run_dir} has job {present[0].id} in the queue already "
            f"({present[0].state}): wait for it, or take it away with scancel {present[0].id}"
        )


def _what_next(request: Request, job: str) -> str:
    run, name = shlex.quote(str(request.run_dir)), request.plan.job_name
    cancel = f"scancel --me --name={name}" if request.plan.chain else f"scancel {job}"
    return "\n".join(
        [
            f"watch:            python slurm/status.py {run}",
            f"                  tail -f {run}/log.txt {run}/logs/job_{job}.log",
            f"stop gracefully:  touch {run}/stop      (saves, ends, is not started again)",
            f"cancel:           {cancel}",
        ]
    )


def _print_all(request: Request, script: str, remarks: list[str]) -> None:
    folder = request.run_dir / "slurm"
    print(f"# --- {folder / 'pretrain.sbatch'}\n{script}")
    print(f"# --- {folder / 'config.yaml'}\n{to_yaml(request.config)}")
    for remark in remarks:
        print(remark)
    times = f"{request.arguments.chain} times" if request.plan.chain else "once"
    print(f"would submit {times}: sbatch {folder / 'pretrain.sbatch'}\n")
    print(_what_next(request, "JOB"))


if __name__ == "__main__":
    run_command(main)
