"""Submits a tool as a job of one node: a corpus to datasets, or a conversion of checkpoints.

    python slurm/submit_tool.py preprocess --time 04:00:00 --job-dir jobs/corpus -- \
        --input 'corpus/*.jsonl.zst' --tokenizer tokenizer --output-prefix data/train
    python slurm/submit_tool.py convert --time 01:00:00 --job-dir jobs/export -- \
        to-hf --checkpoint runs/samba/checkpoints --output samba-hf

What stands after -- goes to tools/preprocess_corpus.py or tools/convert_checkpoint.py as it is, and
relative paths mean what they mean here. A corpus over many nodes: preprocess_corpus.py --slurm.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import run_command  # noqa: E402
from samba_megatron.platform.files import write_text  # noqa: E402
from slurm import checks, render, scheduler  # noqa: E402
from slurm.site_settings import Site, load_site  # noqa: E402

TOOLS = {"preprocess": "preprocess_corpus.py", "convert": "convert_checkpoint.py"}


def main() -> None:
    """Runs the command."""
    arguments, of_tool = _parse(sys.argv[1:])
    checks.seconds_of(arguments.time)
    site = load_site(arguments.site)
    folder = arguments.job_dir.absolute()
    script = job_script(arguments, of_tool, site, folder)
    if arguments.dry_run:
        print(script)
        return
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    path = folder / f"{arguments.tool}.sbatch"
    write_text(path, script)
    print(f"sbatch --test-only: {scheduler.test(str(path))}")
    job = scheduler.submit(str(path))
    log = shlex.quote(str(folder / "logs" / f"{job}.log"))
    print(f"submitted job {job}\nwatch:   squeue -j {job}; tail -f {log}\ncancel:  scancel {job}")


def job_script(arguments: argparse.Namespace, of_tool: list[str], site: Site, folder: Path) -> str:
    """The filled-in template."""
    options: dict[str, Any] = {
        "job-name": f"samba-{arguments.tool}",
        "nodes": 1,
        "ntasks": 1,
        "cpus-per-task": arguments.cpus,
        "mem": arguments.mem,
        **render.allocation(arguments, site),
        "requeue": "",
        "open-mode": "append",
        "output": folder / "logs" / "%j.log",
    }
    # A node may have more cores than the job: the tool would take them all.
    workers = ["--workers", str(arguments.cpus)] if arguments.tool == "preprocess" else []
    return render.fill(
        "tool",
        {
            "directives": render.directives(options, site),
            **render.places(site, Path.cwd(), folder, arguments.container),
            "start": shlex.quote(str(Path.cwd())),
            "cpus": str(arguments.cpus),
            "tool": TOOLS[arguments.tool],
            "arguments": shlex.join([*workers, *of_tool]),
        },
    )


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, what stands after --)."""
    parser = argparse.ArgumentParser(
        usage="submit_tool.py {preprocess,convert} --time 04:00:00 --job-dir DIR [options] "
        "-- ARGUMENTS OF THE TOOL",
        description=__doc__.split("\n\n")[0],
    )
    add = parser.add_argument
    add("tool", choices=TOOLS, help="preprocess_corpus.py or convert_checkpoint.py")
    render.add_allocation(add)
    add("--job-dir", type=Path, required=True, help="folder for the script and the logs")
    add("--cpus", type=int, default=16, help="cores of the job")
    add("--mem", help="Slurm's: memory of the job, as 64G; the partition's when not given")
    add("--container", help="image, instead of the site's")
    add("--site", type=Path, help="the cluster's settings; else the file that SAMBA_SITE names")
    add("--dry-run", action="store_true", help="print the script, submit nothing")
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


if __name__ == "__main__":
    run_command(main)
