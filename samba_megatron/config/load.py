"""From the command line and recipes to a :class:`RunConfig`, and from there to YAML and back.

Later wins: defaults, then the recipes in the order given (each over its own ``base``), then the
dotted overrides, wherever they stand. Nothing here imports torch or megatron.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from samba_megatron.config.fields import Field, build, field_named, run_fields
from samba_megatron.config.recipes import (
    RecipeDumper,
    Setting,
    find_recipe,
    flatten_settings,
    read_recipe,
    read_yaml,
)
from samba_megatron.config.run import RunConfig
from samba_megatron.platform.errors import UserError

COMMAND_LINE = "on the command line"


def parse_run_config(argv: Sequence[str], prog: str = "pretrain_samba.py") -> RunConfig:
    """Reads a command line: ``--config RECIPE`` (repeatable) and ``--group.field VALUE``.

    ``--help`` prints all fields, ``--print_config`` the resolved configuration as YAML; both end
    the process with exit code 0.

    Args:
        argv: the arguments without the program's name.
        prog: the program's name in the help text.

    Raises:
        UserError: unknown option, recipe or key, or a value that does not fit.
    """
    command = _split_arguments(argv)
    if command.help:
        from samba_megatron.config.command_help import help_text

        print(help_text(prog))
        raise SystemExit(0)
    settings: dict[str, Setting] = {}
    for reference in command.recipes:
        settings |= read_recipe(find_recipe(reference))
    for name, text in command.overrides:
        field = field_named(name, COMMAND_LINE)
        settings[name] = Setting(_from_text(field, text), COMMAND_LINE)
    config = _build(settings)
    if command.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain data; :func:`from_dict` gives an equal one."""
    return dataclasses.asdict(config)


def from_dict(data: Mapping[str, Any], place: str = "in the configuration") -> RunConfig:
    """The configuration in nested plain data; missing fields have their defaults.

    Args:
        data: groups of fields, as :func:`to_dict` gives them.
        place: where it is, for errors (``in the saved configuration``).

    Raises:
        UserError: unknown key or a value that does not fit.
    """
    return _build(flatten_settings(dict(data), place))


def to_yaml(config: RunConfig) -> str:
    """The configuration as a recipe that sets every field."""
    return yaml.dump(to_dict(config), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


class _Command(NamedTuple):
    recipes: list[str]
    overrides: list[tuple[str, str]]
    help: bool
    print_config: bool


def _split_arguments(argv: Sequence[str]) -> _Command:
    """Every option takes exactly one value, so that a command line needs no grammar."""
    command = _Command([], [], "--help" in argv or "-h" in argv, "--print_config" in argv)
    words = iter([word for word in argv if word not in ("--print_config", "--help", "-h")])
    for word in words:
        if not word.startswith("--"):
            hint = f"--config {word}" if word.endswith((".yaml", ".yml")) else "--group.field value"
            raise UserError(f"unexpected argument {word!r}: options are written as {hint}")
        name, equals, value = word[2:].partition("=")
        if name != "config" and not command.help:
            field_named(name, COMMAND_LINE)
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise UserError(f"--{name} needs a value, as --{name} VALUE")
        if name == "config":
            command.recipes.append(value)
        else:
            command.overrides.append((name, value))
    return command


def _from_text(field: Field, text: str) -> Any:
    """What the command line says: text stays as it is, the rest is YAML; ``a,b`` is a list."""
    if field.is_text:
        return None if field.optional and text == "null" else text
    if field.is_list and not text.lstrip().startswith("["):
        text = f"[{text}]"
    return read_yaml(text, f"{field.name} {COMMAND_LINE}")


def _build(settings: Mapping[str, Setting]) -> RunConfig:
    fields = run_fields()
    values = {}
    for name, (value, place) in settings.items():
        try:
            values[name] = fields[name].convert(value)
        except ValueError:
            given = "null" if value is None else repr(value)
            raise UserError(
                f"{name} {place} is {given}: it must be {fields[name].allowed}"
            ) from None
    return build(values)
