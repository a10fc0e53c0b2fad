"""The text of ``--help``: every field with its docstring, type and default, by group.

Apart from loading, because collecting docstrings parses source code: only who asks waits for it.
"""

import argparse
import re

import jsonargparse

from samba_megatron.config.fields import run_groups
from samba_megatron.config.run import RunConfig

_DESCRIPTION = (
    "Options are laid over the recipes, later recipes over earlier ones. Numbers of tokens may be "
    "written 500M, 20B or 3.2T; null unsets a field; lists are written a,b or [a, b]."
)


def help_text(prog: str) -> str:
    """The help of a command that takes a run's configuration."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} --config RECIPE [--config RECIPE ...] [--GROUP.FIELD VALUE ...]",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="A recipe file, or the name of a shipped one (samba_421m); may be given again.",
    )
    parser.add_argument(
        "--print_config",
        action="store_true",
        help="Print the configuration that recipes and options make, as YAML, and exit.",
    )
    parser.add_class_arguments(RunConfig)
    for group in run_groups():
        # Whole groups come from recipes, not from options.
        parser._option_string_actions[f"--{group}"].help = argparse.SUPPRESS
    # Docstrings mark code for a page, not for a terminal.
    return re.sub(r"``", "", parser.format_help())
