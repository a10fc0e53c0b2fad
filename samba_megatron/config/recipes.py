"""Recipes: YAML files that set some of the fields, layered over one another.

A recipe may name others under ``base:``; they are read first and its own fields laid over them.
Everything is kept by dotted name together with the file that said it, so that an error can name
both. The YAML is the plain part of YAML 1.2: ``4e-4`` is a number, ``none``, ``yes`` and dates are
text, and a key given twice is an error.
"""

import difflib
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from samba_megatron.config.fields import field_named, run_fields, run_groups
from samba_megatron.platform.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "pretrain" / "recipes"
"""Folder of the shipped recipes."""

BASE_KEY = "base"

_PLAIN_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|nan)",
        list("-+0123456789."),
    ),
)


class Setting(NamedTuple):
    """A value for a field as somebody wrote it."""

    value: Any
    """Plain data, not yet of the field's type."""

    place: str
    """Where it was written: ``in recipe x.yaml`` or ``on the command line``."""


class RecipeLoader(yaml.SafeLoader):
    """Reads the plain part of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own convention)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping whose keys are all different."""
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Writes what :class:`RecipeLoader` reads back unchanged."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012 (PyYAML's own convention)

    def ignore_aliases(self, data: Any) -> bool:
        """Equal lists are written out each time: no anchors."""
        return True


def _represent_text(dumper: RecipeDumper, text: str) -> yaml.ScalarNode:
    """Text; where Unicode line ends are in it, quoted so that they are escaped and survive."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


RecipeDumper.add_representer(str, _represent_text)
for _kind, _regexp, _first in _PLAIN_SCALARS:
    for _side in (RecipeLoader, RecipeDumper):
        _side.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_regexp})$"), _first
        )


def read_yaml(text: str, source: str) -> Any:
    """Reads one YAML value.

    Args:
        text: the YAML.
        source: what the text is, for the error.

    Raises:
        UserError: the text is no YAML; the error names the source and the line.
    """
    try:
        # The loader is a SafeLoader with fewer implicit types.
        return yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).replace("\n", " ")
        raise UserError(f"{source} is not YAML{line}: {problem}") from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes in ``pretrain/recipes`` and its folders, by bare name."""
    return {path.stem: path for path in sorted(RECIPES.rglob("*.yaml"))}


def find_recipe(reference: str, folder: Path | None = None) -> Path:
    """The recipe file that ``reference`` means: a path, or the bare name of a shipped recipe.

    Args:
        reference: a path, or ``samba_421m``.
        folder: where relative paths start; the working directory when not given.

    Raises:
        UserError: there is none; the error suggests similar names.
    """
    path = (folder or Path()) / reference
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if reference in shipped:
        return shipped[reference]
    near = difflib.get_close_matches(Path(reference).stem, shipped, n=3, cutoff=0.5)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"shipped are {', '.join(shipped)}"
    raise UserError(f"there is no recipe {reference}: {remedy}")


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Setting]:
    """The settings of a recipe with all its bases, by dotted name.

    Args:
        path: the recipe file.
        above: the recipes whose ``base`` led here.

    Raises:
        UserError: unreadable file, unknown key, or recipes that are each other's base.
    """
    if path.resolve() in above:
        ring = " → ".join(p.name for p in (*above[above.index(path.resolve()) :], path))
        raise UserError(f"recipe {path} is its own base ({ring}): remove one `base:`")
    content = _read_mapping(path)
    settings: dict[str, Setting] = {}
    for base in _bases(content.pop(BASE_KEY, []), path):
        base_path = find_recipe(base, path.parent)
        settings |= read_recipe(base_path, (*above, path.resolve()))
    return settings | flatten_settings(content, f"in recipe {path}")


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    content = read_yaml(text, f"recipe {path}")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"recipe {path} must hold groups of fields (`model:` …), not {content!r}")
    return content


def _bases(value: Any, path: Path) -> list[str]:
    bases = value if isinstance(value, list) else [value]
    if not all(isinstance(base, str) for base in bases):
        raise UserError(f"base in recipe {path} is {value!r}: it must name recipes")
    return bases


def flatten_settings(content: dict[str, Any], place: str, group: str = "") -> dict[str, Setting]:
    """Nested groups to settings by dotted name; the names are checked, the values are not."""
    settings: dict[str, Setting] = {}
    for key, value in content.items():
        name = f"{group}.{key}" if group else str(key)
        if name not in run_groups():
            settings[field_named(name, place).name] = Setting(value, place)
        elif isinstance(value, dict):
            settings |= flatten_settings(value, place, name)
        elif value is not None:
            example = next(field for field in run_fields() if field.startswith(f"{name}."))
            raise UserError(f"{name} {place} is {value!r}: it must hold fields, as {example}")
    return settings
