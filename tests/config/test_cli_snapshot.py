"""The command line is an interface: what changes in it must be seen in a review.

``python tests/config/test_cli_snapshot.py`` writes the snapshot anew.
"""

import difflib
from pathlib import Path

from samba_megatron.config.fields import run_fields

SNAPSHOT = Path(__file__).with_name("cli_snapshot.txt")


def options() -> str:
    """Every option with its type and default, a line each."""
    lines = ["--config RECIPE (repeatable)", "--print_config", "--help"]
    for field in run_fields().values():
        lines.append(f"--{field.name}: {field.allowed} = {field.default!r}")
    return "\n".join(lines) + "\n"


def test_the_command_line_is_the_one_on_record():
    recorded = SNAPSHOT.read_text().splitlines()
    difference = "\n".join(
        difflib.unified_diff(recorded, options().splitlines(), "on record", "now", lineterm="", n=0)
    )
    assert not difference, (
        f"the command line has changed:\n{difference}\n"
        "if this is meant: python tests/config/test_cli_snapshot.py"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(options())
