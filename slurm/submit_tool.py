"""Submits a tool: a corpus to datasets, as an array of jobs, or a conversion of checkpoints.

    python slurm/submit_tool.py preprocess --tasks 64 --time 04:00:00 --job-dir jobs/corpus \
        --input 'corpus/*.jsonl.zst' --output-prefix data/train -- --tokenizer tokenizer
    python slurm/submit_tool.py convert --time 01:00:00 --job-dir jobs/export -- export …

What stands after -- goes to tools/preprocess_corpus.py or tools/convert_checkpoint.py as it is.
"""

import argparse
import glob
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from slurm import checks, render, scheduler  # noqa: E402
from slurm.site_settings import load_site  # noqa: E402


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    checks.seconds_of(arguments.time)
    site = load_site(arguments.site)
    for name in ("account", "partition", "reservation", "qos", "constraint"):
        setattr(arguments, name, getattr(arguments, name) or getattr(site, name))
    folder = arguments.job_dir.absolute()
    values = {
        "directives": render.directives(_options(arguments, folder), site),
        **render.places(site, folder, arguments.container),
        "arguments": shlex.join(arguments.rest),
    }
    del values["run_dir"], values["host_python"]
    if arguments.tool == "preprocess":
        values |= _array(arguments, folder)
    script = render.fill(arguments.tool, values)
    if arguments.dry_run:
        print(script)
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    if arguments.tool == "preprocess":
        render.write(folder / "inputs.txt", "".join(f"{path}\n" for path in _files(arguments)))
        Path(arguments.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.tool}.sbatch"
    render.write(path, script)
    print(f"sbatch --test-only: {scheduler.test(str(path))}")
    job = scheduler.submit(str(path))
    print(f"submitted job {job}\nwatch:   squeue -j {job}; tail -f {folder}/logs/*")
    print(f"cancel:  scancel {job}")


def _options(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    is_array = arguments.tool == "preprocess"
    return {
        "job-name": f"samba-{arguments.tool}",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": arguments.cpus,
        "array": f"0-{arguments.tasks - 1}" if is_array else None,
        "time": arguments.time,
        "account": arguments.account,
        "partition": arguments.partition,
        "reservation": arguments.reservation,
        "qos": arguments.qos,
        "constraint": arguments.constraint,
        "requeue": "",
        "open-mode": "append",
        "output": folder / "logs" / ("%A_%a.log" if is_array else "%j.log"),
    }


def _array(arguments: argparse.Namespace, folder: Path) -> dict[str, str]:
    """What only the array has.

    Raises:
        UserError: there are fewer files than tasks.
    """
    files = _files(arguments)
    if len(files) < arguments.tasks:
        raise UserError(
            f"--input {' '.join(arguments.input)} names {len(files)} files for {arguments.tasks} "
            f"tasks: use --tasks {len(files) or 1} or fewer, or check the path"
        )
    return {
        "tasks": str(arguments.tasks),
        "inputs": shlex.quote(str(folder / "inputs.txt")),
        "output_prefix": shlex.quote(str(Path(arguments.output_prefix).absolute())),
        "cpus": str(arguments.cpus),
    }


def _files(arguments: argparse.Namespace) -> list[str]:
    patterns = [str(Path(pattern).absolute()) for pattern in arguments.input]
    return sorted({path for pattern in patterns for path in glob.glob(pattern)})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    tools = parser.add_subparsers(dest="tool", required=True)
    for name in ("preprocess", "convert"):
        add = tools.add_parser(name).add_argument
        add("--time", required=True, help="limit of a job, as 04:00:00")
        add("--job-dir", type=Path, required=True, help="folder for the script and the logs")
        add("--cpus", type=int, default=16, help="cores of a job")
        for option in ("account", "partition", "reservation", "qos", "constraint"):
            add(f"--{option}", help=f"Slurm's; the site's {option} when not given")
        add("--container", help="image, instead of the site's")
        add("--site", type=Path, help="the cluster's settings; else the file SAMBA_SITE names")
        add("--dry-run", action="store_true", help="print the script, submit nothing")
        if name == "preprocess":
            add("--tasks", type=int, required=True, help="jobs of the array")
            add("--input", nargs="+", required=True, help="JSON lines files or globs, in quotes")
            add("--output-prefix", required=True, help="of the datasets: PREFIX_00000 and so on")
        add("rest", nargs="*", metavar="-- ARGUMENTS", help="of the tool")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
