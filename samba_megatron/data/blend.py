"""What a run reads, in the user's words: sources, their shares, caps and stages.

A blend is a list of prefixes (``data.data_path``) or comes from blend files (``data.blend_file``),
which can also say how often a source may be repeated and how the shares change over the run.
Nothing here needs torch or megatron, and nothing is read but the blend files themselves.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from samba_megatron.config.data import DataConfig
from samba_megatron.config.units import TOKENS_ALLOWED, parse_tokens
from samba_megatron.platform.errors import UserError

_FILE_KEYS = ("sources", "stages", "max_epochs")
_SOURCE_KEYS = ("name", "prefix", "weight", "tokens", "documents", "max_epochs")
_STAGE_KEYS = ("until_tokens", "weights")


@dataclass(frozen=True)
class Source:
    """One indexed dataset of a blend."""

    name: str
    """What it is called; the prefix itself in ``data_path``."""
    prefix: str
    weight: float | None = None
    """Its share, relative to the others'; None: in proportion to its tokens."""
    max_epochs: float | None = None
    """The most often it is read; None: as often as its share asks for."""
    tokens: int | None = None
    """How many the blend file says it has: compared with the dataset."""
    documents: int | None = None
    """As ``tokens``."""


@dataclass(frozen=True)
class Stage:
    """Shares that hold up to a number of tokens of the run."""

    until_tokens: int | None = None
    """Tokens of the whole run after which the next stage begins; None: to the end."""
    weights: Mapping[str, float] | None = None
    """Shares by name or pattern (``web*``), 0 for what is not named; None: the sources' own."""


@dataclass(frozen=True)
class Blend:
    """The sources of a run and how their shares change."""

    sources: tuple[Source, ...]
    stages: tuple[Stage, ...] = ()
    """In order. After the last one the sources' own weights hold."""
    place: str = "data.data_path"
    """Where it was written, for errors."""

    @property
    def prefixes(self) -> list[str]:
        """The datasets, in order."""
        return [source.prefix for source in self.sources]

    def own_weights(self, tokens: Sequence[int]) -> list[float]:
        """The share of each source outside stages, given the tokens of each."""
        if any(source.weight is None for source in self.sources):
            return [float(count) for count in tokens]
        return [float(source.weight or 0.0) for source in self.sources]

    def stage_weights(self, stage: Stage, tokens: Sequence[int]) -> list[float]:
        """The share of each source in a stage.

        The weight of a pattern is divided among the sources that it matches by their own weights.
        """
        own = self.own_weights(tokens)
        if stage.weights is None:
            return own
        shares = [0.0] * len(own)
        for pattern, weight in stage.weights.items():
            members = _matches(pattern, self.sources)
            whole = sum(own[member] for member in members)
            for member in members:
                part = own[member] / whole if whole else 1 / len(members)
                shares[member] = weight * part
        return shares


def training_blend(data: DataConfig) -> Blend:
    """The blend that a run trains on.

    Raises:
        UserError: both ``data_path`` and ``blend_file`` are given or neither is, or one is wrong.
    """
    if data.data_path and data.blend_file:
        raise UserError(
            "data.data_path and data.blend_file are both given: keep one of them (a blend file "
            "can name any dataset)"
        )
    return read_blend_files(data.blend_file) if data.blend_file else parse_blend(data.data_path)


def validation_blend(paths: Sequence[str]) -> Blend:
    """The held-out datasets of ``data.valid_data_path``: prefixes, or blend files (``.yaml``).

    Raises:
        UserError: both are mixed, or one is wrong.
    """
    files = [path for path in paths if str(path).endswith((".yaml", ".yml"))]
    if not files:
        return parse_blend(paths, "valid_data_path")
    if len(files) < len(paths):
        raise UserError(
            f"data.valid_data_path mixes prefixes with the blend file {files[0]}: give one kind"
        )
    return read_blend_files(files)


def parse_blend(paths: Sequence[str], name: str = "data_path") -> Blend:
    """Reads prefixes (``[a, b]``) or alternating weights and prefixes (``[0.3, a, 0.7, b]``).

    Raises:
        UserError: nothing is given, a dataset is named twice, or the weights are not all there and
            positive.
    """
    items = [str(path).strip() for path in paths]
    if not items:
        raise UserError(f"data.{name} is empty: name at least one dataset prefix")
    numeric = [_number(item) for item in items]
    if all(weight is None for weight in numeric):
        return _named_once([Source(item, item) for item in items], f"data.{name}")
    weights, prefixes = numeric[::2], items[1::2]
    if (
        len(items) % 2
        or any(weight is None for weight in weights)
        or any(number is not None for number in numeric[1::2])
    ):
        raise UserError(
            f"data.{name} mixes weights and prefixes: give prefixes alone, or a weight before "
            "each prefix"
        )
    given = [weight for weight in weights if weight is not None]
    if min(given) <= 0 or not sum(given) < float("inf"):
        raise UserError(f"data.{name} has the weights {given}: each must be a positive number")
    sources = [Source(p, p, weight) for p, weight in zip(prefixes, given, strict=True)]
    return _named_once(sources, f"data.{name}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def split_fractions(split: str) -> tuple[float, float, float]:
    """Reads Megatron's split (``"98,2,0"``) as fractions for training, validation and test.

    Raises:
        UserError: it is not up to three numbers, not negative, with a positive sum.
    """
    parts = [_number(part) for part in split.split(",")]
    known = [part for part in parts if part is not None and 0 <= part < float("inf")]
    if len(known) != len(parts) or len(parts) > 3 or sum(known) == 0:
        raise UserError(f'data.split is {split!r}: give up to three weights, such as "98,2,0"')
    train, valid, test = [part / sum(known) for part in [*known, 0.0, 0.0][:3]]
    return train, valid, test


def read_blend_files(paths: Sequence[str | Path]) -> Blend:
    """Reads blend files; the sources of several are put together.

    A file holds ``sources`` (each with ``prefix`` and, as wanted, ``name``, ``weight``,
    ``max_epochs``, ``tokens``, ``documents``), and possibly ``max_epochs`` for all of them and
    ``stages``. Relative prefixes start at the file's folder.

    Raises:
        UserError: one sentence with the file and what is wrong in it.
    """
    blends = [_read_blend_file(Path(path)) for path in paths]
    place = ", ".join(blend.place for blend in blends)
    staged = [blend for blend in blends if blend.stages]
    if len(staged) > 1:
        raise UserError(f"{staged[0].place} and {staged[1].place} both have stages: keep one's")
    sources = [source for blend in blends for source in blend.sources]
    _weights_for_all(sources, place)
    whole = replace(_named_once(sources, place), stages=staged[0].stages if staged else ())
    for stage in whole.stages:
        _check_names(stage, whole)
    return whole


def _read_blend_file(path: Path) -> Blend:
    content = _mapping(_read_yaml(path), _FILE_KEYS, f"{path}")
    entries = content.get("sources")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} has no sources: give a list of them, each with a prefix")
    common = _epochs(content.get("max_epochs"), f"{path}")
    sources = [_source(entry, path, number, common) for number, entry in enumerate(entries, 1)]
    stages = content.get("stages") or []
    if not isinstance(stages, list):
        raise UserError(f"stages in {path} is {stages!r}: it must be a list")
    found = tuple(_stage(entry, path, number) for number, entry in enumerate(stages, 1))
    _check_order(found, path)
    return Blend(tuple(sources), found, str(path))


def _read_yaml(path: Path) -> Any:
    """The file's content. Thousands of sources take PyYAML's own parser seconds, libyaml's not."""
    import yaml

    from samba_megatron.config.recipes import RecipeLoader, read_yaml

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the blend file {path} ({reason})") from error
    if not hasattr(yaml, "CSafeLoader"):
        return read_yaml(text, str(path))

    class Loader(yaml.CSafeLoader):
        yaml_implicit_resolvers = RecipeLoader.yaml_implicit_resolvers

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            if len({key.value for key, _ in node.value}) < len(node.value):
                raise yaml.YAMLError("a key is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return read_yaml(text, str(path))  # which has the error's words


def _mapping(value: Any, allowed: Sequence[str], place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} is {value!r}: it must hold {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"known are {', '.join(allowed)}"
            raise UserError(f"{place} has {key!r}, which is not known: {remedy}")
    return value


def _source(entry: Any, path: Path, number: int, max_epochs: float | None) -> Source:
    place = f"source {number} of {path}"
    content = _mapping(entry, _SOURCE_KEYS, place)
    prefix = content.get("prefix")
    if not isinstance(prefix, str) or not prefix:
        raise UserError(f"{place} has no prefix: give the dataset's path without .bin or .idx")
    if prefix.endswith((".bin", ".idx")):
        raise UserError(f"{place} has {prefix}: give the prefix without the ending, {prefix[:-4]}")
    name = str(content.get("name") or prefix)
    place = f"{name} in {path}"
    return Source(
        name=name,
        prefix=str(path.parent / prefix),
        weight=_weight(content.get("weight"), place),
        max_epochs=_epochs(content.get("max_epochs"), place) or max_epochs,
        tokens=_count(content, "tokens", place),
        documents=_count(content, "documents", place),
    )


def _weight(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
        raise UserError(f"{place} has the weight {value}: it must be a number, 0 or more")
    return float(value)


def _epochs(value: Any, place: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise UserError(f"{place} has max_epochs {value}: it must be a number over 0")
    return float(value)


def _count(content: Mapping[str, Any], key: str, place: str) -> int | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{place} has {key} {value!r}: it must be a whole number")
    return value


def _stage(entry: Any, path: Path, number: int) -> Stage:
    place = f"stage {number} of {path}"
    content = _mapping(entry, _STAGE_KEYS, place)
    until = content.get("until_tokens")
    if until is not None:
        try:
            until = parse_tokens(until)
        except ValueError:
            raise UserError(
                f"{place} has until_tokens {until!r}: it must be {TOKENS_ALLOWED}"
            ) from None
    weights = content.get("weights")
    if weights is None:
        return Stage(until)
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"weights in {place} is {weights!r}: give a weight for each source's name")
    shares = {str(name): _weight(value, f"{name} in {place}") for name, value in weights.items()}
    if not sum(share or 0.0 for share in shares.values()):
        raise UserError(f"the weights in {place} are all 0: give one source a share")
    return Stage(until, {name: share or 0.0 for name, share in shares.items()})


def _check_order(stages: Sequence[Stage], path: Path) -> None:
    before = 0
    for number, stage in enumerate(stages, 1):
        if stage.until_tokens is None:
            if number < len(stages):
                raise UserError(
                    f"stage {number} of {path} has no until_tokens, and another stage follows: "
                    "only the last may go on to the end"
                )
        elif stage.until_tokens <= before:
            raise UserError(
                f"stage {number} of {path} has until_tokens {stage.until_tokens}, not more than "
                f"the {before} before it: tokens are counted from the run's beginning"
            )
        before = stage.until_tokens or before


def _weights_for_all(sources: Sequence[Source], place: str) -> None:
    without = [source.name for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise UserError(
            f"{without[0]} in {place} has no weight and others have: give it to all or to none"
        )
    if not without and not sum(source.weight or 0.0 for source in sources):
        raise UserError(f"the weights in {place} are all 0: give one source a share")


def _named_once(sources: Sequence[Source], place: str) -> Blend:
    seen: dict[str, str] = {}
    for source in sources:
        path = str(Path(source.prefix).absolute())
        if path in seen or source.name in seen:
            raise UserError(
                f"{place} names {source.name} twice: name it once, with the sum of the weights"
            )
        seen |= {path: source.name, source.name: path}
    return Blend(tuple(sources), (), place)


def _matches(pattern: str, sources: Sequence[Source]) -> list[int]:
    exact = [number for number, source in enumerate(sources) if source.name == pattern]
    if exact:
        return exact
    return [number for number, s in enumerate(sources) if fnmatchcase(s.name, pattern)]


def _check_names(stage: Stage, blend: Blend) -> None:
    taken: dict[int, str] = {}
    for pattern in stage.weights or {}:
        members = _matches(pattern, blend.sources)
        if not members:
            names = [source.name for source in blend.sources]
            near = difflib.get_close_matches(pattern, names, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"they are {', '.join(names[:5])}"
            raise UserError(
                f"a stage of {blend.place} names {pattern}, which is no source: {remedy}"
            )
        for member in members:
            if member in taken:
                raise UserError(
                    f"a stage of {blend.place} gives {blend.sources[member].name} a share under "
                    f"{taken[member]} and under {pattern}: name it once"
                )
            taken[member] = pattern
