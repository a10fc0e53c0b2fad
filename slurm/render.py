"""Fills the job templates in: #SBATCH lines and the site's part; everything else stands there.

A template is a shell script with ``{{name}}`` where a value goes.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm.site_settings import Site

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "templates"
SITE_OPTIONS = ("account", "partition", "reservation", "qos", "constraint")
"""Options of sbatch that the site's file can give too."""


def fill(template: str, values: dict[str, str]) -> str:
    """The script of a template.

    Args:
        template: its name in ``slurm/templates``, without ``.sbatch``.
        values: text for each ``{{name}}`` in it: all of them, and no others.
    """
    text = (TEMPLATES / f"{template}.sbatch").read_text()
    wanted = set(re.findall(r"\{\{(\w+)\}\}", text))
    if wanted != set(values):
        raise ValueError(f"{template}.sbatch has {wanted ^ set(values)} too few or too many")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], text)


def add_allocation(add: Callable[..., object]) -> None:
    """Adds the options of sbatch that every command takes to a parser, by its ``add_argument``."""
    add("--time", required=True, help="limit of one job, as 24:00:00")
    for name in SITE_OPTIONS:
        add(f"--{name}", help=f"Slurm's; the site's {name} when not given")


def allocation(arguments: argparse.Namespace, site: Site) -> dict[str, Any]:
    """The values of those options, the site's where none is given; None where that has none."""
    given = {name: getattr(arguments, name) or getattr(site, name) for name in SITE_OPTIONS}
    return {"time": arguments.time, **given}


def directives(options: dict[str, Any], site: Site) -> str:
    """#SBATCH lines.

    Args:
        options: of sbatch, by name; those that are None are left out, ``""`` is a mere switch.
        site: adds its own options.
    """
    lines = []
    for name, value in options.items():
        if value is not None:
            text = "" if value == "" else f"={shlex.quote(str(value))}"
            lines.append(f"#SBATCH --{name}{text}")
    return "\n".join([*lines, *(f"#SBATCH {option}" for option in site.sbatch_options)])


def environment(site: Site) -> str:
    """Shell lines: modules, the virtual environment, variables."""
    lines = [f"module load {' '.join(map(shlex.quote, site.modules))}"] if site.modules else []
    if site.runtime.kind == "virtualenv":
        folder = site.runtime.virtualenv or sys.prefix
        lines.append(f"export PATH={shlex.quote(f'{folder}/bin')}:$PATH")
    if site.scratch:
        lines.append(f'export TMPDIR="{site.scratch}"')  # may name $USER or $SLURM_JOB_ID
    lines += [
        f"export {name}={shlex.quote(value)}" for name, value in sorted(site.environment.items())
    ]
    if site.cpus_per_gpu:
        # Since 22.05 a step does not inherit it from the job.
        lines.append(f"export SRUN_CPUS_PER_TASK={site.cpus_per_gpu}")
    # A container may have the packages without this one.
    return "\n".join([*lines, f"export PYTHONPATH={shlex.quote(str(ROOT))}:${{PYTHONPATH:-}}"])


def srun_options(site: Site, start: Path, run_dir: Path, container: str | None = None) -> str:
    """Options of each srun: the site's and, with pyxis, the container's."""
    options = list(site.srun_options)
    image = container or site.runtime.image
    if site.runtime.kind == "pyxis":
        mounts = ",".join(_mounts(site, start, run_dir))
        options += [f"--container-image={image}", f"--container-mounts={mounts}"]
        options += [f"--container-workdir={start}", *site.runtime.options]
    return " ".join(map(shlex.quote, options))


def python(site: Site, start: Path, run_dir: Path, container: str | None = None) -> str:
    """The command that starts Python for a rank."""
    if site.runtime.kind != "apptainer":
        return "python"
    image = container or site.runtime.image
    binds = [word for mount in _mounts(site, start, run_dir) for word in ("--bind", mount)]
    words = ["apptainer", "exec", "--nv", *binds, "--pwd", str(start), *site.runtime.options]
    return " ".join([*map(shlex.quote, [*words, str(image)]), "python"])


def places(site: Site, start: Path, run_dir: Path, container: str | None = None) -> dict[str, str]:
    """What every template has: where the code is, the environment, and how Python is started.

    Args:
        site: the cluster's settings.
        start: folder that Python starts in.
        run_dir: folder that it writes to.
        container: image, instead of the site's.
    """
    return {
        "code": shlex.quote(str(ROOT)),
        "python": python(site, start, run_dir, container),
        "environment": environment(site),
        "srun_options": srun_options(site, start, run_dir, container),
    }


def _mounts(site: Site, start: Path, run_dir: Path) -> list[str]:
    """The code, the run and what the site adds, each where it is outside too."""
    paths = [str(ROOT), str(start), str(run_dir), *site.runtime.mounts]
    return [path if ":" in path else f"{path}:{path}" for path in dict.fromkeys(paths)]


def node_check(site: Site) -> str:
    """Shell lines that check every node and write reports into ``$reports``."""
    check, lines = site.node_check, []
    if check.enabled:
        options = ['--output "$reports"', '--disk "$RUN"']
        options += ['--gpus "$GPUS"'] if check.count_gpus else []
        for name, value in (
            ("--min-free-gb", check.min_free_gb),
            ("--min-matmul-tflops", check.min_matmul_tflops),
        ):
            options += [f"{name} {value:g}"] if value is not None else []
        command = " ".join(["-m samba_megatron.platform.preflight", *options])
        lines.append(f"    launch check nodes {command}")
        if check.across:
            lines[-1] += " &&"
            across = '-m samba_megatron.platform.preflight --output "$reports" --across'
            lines.append(f"        launch across hosts {across}")
    return "\n".join(lines) or "    : # the site has switched it off"
