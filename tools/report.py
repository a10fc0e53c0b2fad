"""Writes one HTML file about a run, or about several to be compared: plots, events, configuration.

It opens in any browser without a network.
"""

import argparse
from pathlib import Path

from samba_megatron.platform.errors import UserError, run_command


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    output_help = "the file (default: report.html in the only run's folder, or here)"
    parser.add_argument("--output", type=Path, help=output_help)
    arguments = parser.parse_args()
    runs: list[Path] = arguments.runs
    from samba_megatron.platform.files import write_text
    from samba_megatron.tracking.history import read_history
    from samba_megatron.tracking.report.page import render

    histories = [read_history(run) for run in runs]
    output = arguments.output or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UserError(f"--output {output} must be a file in a folder that exists")
    write_text(output, render(histories))
    print(output)


if __name__ == "__main__":
    run_command(main)
