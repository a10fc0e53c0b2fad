"""The fields of the configuration seen from outside: names, types, what a value may be.

Recipes, the command line, saved configurations and error messages all address a field by its
dotted name (``model.window_size``). The types used are few (numbers, text, choices, lists and
"unset"), so that what fits, and how to say so, is decided here once and strictly: a recipe in
which ``true`` stands for a number or ``null`` for a size that cannot be unset is wrong.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from samba_megatron.config.run import RunConfig
from samba_megatron.config.units import TOKENS_ALLOWED, parse_tokens
from samba_megatron.platform.errors import UserError


@dataclass(frozen=True)
class Field:
    """One field that a recipe can set."""

    name: str
    """Dotted name: ``group.field``, or ``field`` for those of the run itself."""

    type: Any
    """Its annotation, without "or unset"."""

    optional: bool
    """Whether it may be unset (``null``)."""

    default: Any
    """Value when no recipe gives one."""

    @property
    def is_tokens(self) -> bool:
        """Whether it counts tokens, and so reads ``20B``."""
        return self.type is int and self.name.endswith("_tokens")

    @property
    def is_text(self) -> bool:
        """Whether its values are words: then the command line's are taken as they stand."""
        return self.type is str or get_origin(self.type) is Literal

    @property
    def is_list(self) -> bool:
        """Whether it holds a list."""
        return get_origin(self.type) is list

    @property
    def allowed(self) -> str:
        """The values that fit, in words."""
        kind = TOKENS_ALLOWED if self.is_tokens else _describe(self.type)
        return f"{kind}, or null" if self.optional else kind

    def convert(self, value: Any) -> Any:
        """The field's value from ``value``, as read from YAML.

        Raises:
            ValueError: it does not fit.
        """
        if value is None and self.optional:
            return None
        if self.is_tokens and isinstance(value, str | int | float):
            return parse_tokens(value)
        return _convert(self.type, value)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        (item,) = get_args(kind)
        if get_origin(item) is Literal:
            return f"a list with {', '.join(get_args(item))} or some of them"
        return {int: "a list of whole numbers, as [4096, 8192]", str: "a list, as [a, b]"}[item]
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _convert(kind: Any, value: Any) -> Any:
    """``value`` as a ``kind``; a number stands for text in lists only (``[0.3, corpus]``)."""
    if get_origin(kind) is Literal:
        fits = isinstance(value, str) and value in get_args(kind)
    elif get_origin(kind) is list:
        fits = isinstance(value, list)
        if fits:
            (item,) = get_args(kind)
            return [_convert(item, str(v) if item is str and _is_number(v) else v) for v in value]
    elif kind is float:
        fits = _is_number(value) and math.isfinite(value)
        value = float(value) if fits else value
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise ValueError(f"{value!r} is not {_describe(kind)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def run_fields() -> Mapping[str, Field]:
    """All fields of :class:`RunConfig` by dotted name, in the order in which they are declared."""
    found: dict[str, Field] = {}
    run_types = get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        kind = run_types[field.name]
        if dataclasses.is_dataclass(kind):
            types = get_type_hints(kind)
            for inner in dataclasses.fields(kind):
                name = f"{field.name}.{inner.name}"
                found[name] = _field(name, inner, types[inner.name])
        else:
            found[field.name] = _field(field.name, field, kind)
    return found


@cache
def run_groups() -> tuple[str, ...]:
    """The names of the groups of fields: ``model``, ``data``, …"""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in run_fields() if "." in name))


def _field(name: str, field: "dataclasses.Field[Any]", annotation: Any) -> Field:
    optional = False
    if get_origin(annotation) in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not NoneType]
        optional = len(parts) < len(get_args(annotation))
        (annotation,) = parts
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    return Field(name, annotation, optional, default)


def flatten(config: RunConfig) -> dict[str, Any]:
    """The values of ``config`` by dotted name."""
    values = {}
    for name in run_fields():
        group, _, inner = name.rpartition(".")
        values[name] = getattr(getattr(config, group) if group else config, inner)
    return values


def build(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with the given fields by dotted name and defaults for the others."""
    config = RunConfig()
    for name, value in values.items():
        group, _, inner = name.rpartition(".")
        setattr(getattr(config, group) if group else config, inner, value)
    return config


def field_named(name: str, place: str) -> Field:
    """The field ``name``; a :class:`UserError` that suggests another one when there is none.

    Args:
        name: dotted name.
        place: where it was written (``in recipe x.yaml``, ``on the command line``), for the error.
    """
    field = run_fields().get(name)
    if field is not None:
        return field
    if name in run_groups():
        example = next(known for known in run_fields() if known.startswith(f"{name}."))
        raise UserError(f"{name} {place} is a group of fields: set one of them, as {example}")
    suggestion = nearest_field(name)
    remedy = f"did you mean {suggestion}?" if suggestion else "--help lists all fields"
    raise UserError(f"{name} {place} is not a known field: {remedy}")


def nearest_field(name: str) -> str | None:
    """The field whose name is most like ``name``, if any is alike.

    A missing or wrong group matters less than the field's own name.
    """

    def likeness(known: str) -> float:
        own = _ratio(name.rpartition(".")[2], known.rpartition(".")[2])
        return 0.7 * own + 0.3 * _ratio(name, known)

    best = max(run_fields(), key=likeness)
    return best if likeness(best) > 0.65 else None


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()
