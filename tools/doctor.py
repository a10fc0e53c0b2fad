"""Looks at this machine: what is installed, which kernels work, what lacks and what that costs.

Every kernel that can run here is run against its reference. Whatever fails, fails alone.
"""

import argparse
import dataclasses
import json
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError:
    sys.exit("error: this Python lacks Samba-Megatron's packages: run make setup, then make doctor")

from samba_megatron.platform import installed, machine, nvidia_smi  # noqa: E402
from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.platform.exits import ExitCode  # noqa: E402
from samba_megatron.platform.findings import Finding, State, look  # noqa: E402
from samba_megatron.platform.trials import run_in_children  # noqa: E402

_EXIT_CODES = """exit code: 0, training works here; 1, something that it needs is broken; 2, wrong
arguments. What is merely absent or slow does not count."""
_MARKS = {
    State.OK: ("ok", "green"),
    State.OFF: ("-", "dim"),
    State.POOR: ("!", "yellow"),
    State.BROKEN: ("BROKEN", "bold red"),
}
_TRIAL_SECONDS = 180.0
"""A first import from a slow shared disk takes long; what is silent for longer hangs."""


def main() -> ExitCode:
    """Looks, reports, and says by the exit code whether training works here."""
    arguments = _parse()
    started = time.monotonic()
    console = Console(stderr=arguments.json, highlight=False)
    gpus = nvidia_smi.query()
    probes = [
        (installed.AREA, installed.probes(_pins(), bool(gpus))),
        (machine.AREA, machine.probes(arguments.disk, gpus)),
    ]
    findings = [finding for area, some in probes for finding in look(area, some)]
    findings += _tried(console)
    seconds = time.monotonic() - started
    works = all(finding.state is not State.BROKEN for finding in findings)
    if arguments.json:
        listed = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"ok": works, "seconds": round(seconds, 1), "findings": listed}, indent=1))
    else:
        _report(console, findings, seconds)
    return ExitCode.DONE if works else ExitCode.FAILED


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=_EXIT_CODES)
    parser.add_argument("--json", action="store_true", help="the findings as JSON, for scripts")
    disk_help = "folder of the file system that runs are written to (this one)"
    parser.add_argument("--disk", type=Path, default=Path(), help=disk_help)
    arguments = parser.parse_args()
    if not arguments.disk.is_dir():
        raise UserError(f"--disk {arguments.disk} is no folder: name one that exists")
    return arguments


def _pins() -> dict[str, str]:
    """The versions that this clone is tested with, by distribution name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    pairs = [requirement.split("==") for some in lists for requirement in some]
    return {name.partition("[")[0]: version for name, version in pairs}


def _tried(console: Console) -> list[Finding]:
    """What the trials found; which one runs is shown meanwhile, where somebody is watching."""
    findings = []
    with console.status("trying torch …") as status:
        for finding in run_in_children("samba_megatron.ops.trials", _TRIAL_SECONDS):
            status.update(f"{finding.name}: {finding.state} …")
            findings.append(finding)
    return findings


def _report(console: Console, findings: list[Finding], seconds: float) -> None:
    for area in dict.fromkeys(finding.area for finding in findings):
        console.print(_table(area, [finding for finding in findings if finding.area == area]))
    to_mend = [finding for finding in findings if finding.fix and finding.state is not State.OFF]
    for finding in to_mend:
        _, style = _MARKS[finding.state]
        line = f"{finding.name}: {finding.fix}"
        console.print(line, style=style, markup=False, soft_wrap=True)
    console.print(_verdict(findings, seconds), markup=False, soft_wrap=True)


def _table(area: str, findings: list[Finding]) -> Table:
    table = Table(title=f"\n{area}", title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=40)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.state]
        text = "; ".join(filter(None, [finding.found, finding.meaning]))
        shown = Text(text, style="dim" if finding.state is State.OFF else "")
        table.add_row(Text(mark, style=style), finding.name, shown)
    return table


def _verdict(findings: list[Finding], seconds: float) -> str:
    broken = [finding.name for finding in findings if finding.state is State.BROKEN]
    poor = [finding.name for finding in findings if finding.state is State.POOR]
    looked = f"{len(findings)} things looked at in {seconds:.0f} s"
    if broken:
        return f"\nTraining here is BROKEN until these are mended: {', '.join(broken)} ({looked})."
    if poor:
        return f"\nTraining works here; it could be better: {', '.join(poor)} ({looked})."
    return f"\nTraining works here, with everything on that it can use ({looked})."


if __name__ == "__main__":
    run_command(main)
