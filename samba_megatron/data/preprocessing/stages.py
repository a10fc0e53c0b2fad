"""Optional stages between reading and tokenizing: datatrove's filters and deduplication.

A stage is a name with options; the command's flags and ``--stages FILE`` give the same list. A
deduplication compares all documents with each other, so it first runs pipelines of its own: they
read the shards, apply the stages before it, and note which documents go.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samba_megatron.data.preprocessing.shard_writer import Job
from samba_megatron.platform.errors import UserError

DEDUPLICATIONS = ("exact_dedup", "minhash_dedup")
STAGES = {
    "url": "drop documents by the address under 'url' (datatrove's URLFilter)",
    "language": "keep languages: 'model' is the path of a fasttext model, 'languages' a list",
    "gopher_repetition": "Gopher's rules against repetition",
    "gopher_quality": "Gopher's rules of quality",
    "c4": "C4's rules of quality",
    "fineweb": "FineWeb's rules of quality",
    "length": "min_characters, max_characters",
    "exact_dedup": "one of documents with the same text",
    "minhash_dedup": "one of documents with nearly the same text (MinHash)",
}
"""Every stage, and what it does."""

Steps = list[Any]


@dataclass(frozen=True)
class Phase:
    """One pipeline that runs before the last, over all its tasks."""

    name: str
    steps: Callable[[], Steps]
    """Builds the steps, those that read the documents included."""
    tasks: int


@dataclass
class Plan:
    """What the stages of a job come to."""

    phases: list[Phase] = field(default_factory=list)
    """In order; each needs those before it."""
    filters: Callable[[], Steps] = list
    """Builds the steps between reading and tokenizing of the last pipeline."""


def parse_stages(content: Any, origin: str) -> list[dict[str, Any]]:
    """Reads a list of stages: names, or one-key mappings of a name to its options.

    Raises:
        UserError: it is something else, or names a stage that does not exist.
    """
    if isinstance(content, dict) and set(content) == {"stages"}:
        content = content["stages"]
    if not isinstance(content, list):
        raise UserError(f"{origin} must be a list of stages: {', '.join(STAGES)}")
    stages = []
    for entry in content:
        named = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or len(named) != 1:
            raise UserError(f"{origin}: {entry!r} is not a stage's name with its options")
        name, options = next(iter(named.items()))
        if name not in STAGES:
            raise UserError(f"{origin}: there is no stage {name!r}, but {', '.join(STAGES)}")
        if not isinstance(options or {}, dict):
            raise UserError(f"{origin}: the options of {name} must be names with values")
        stages.append({"name": name, "options": dict(options or {})})
    return stages


def read_stages(path: str) -> list[dict[str, Any]]:
    """Reads a YAML file of stages."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the stages {path}: {error}") from error
    return parse_stages(content, path)


def plan_stages(job: Job, read: Callable[[], Steps]) -> Plan:
    """Turns a job's stages into pipelines.

    Args:
        job: its options name the stages.
        read: builds the step that reads documents.

    Raises:
        UserError: a stage has an option that it does not know, or needs a package or file that
            is not there.
    """
    plan = Plan()
    builders: list[Callable[[], Steps]] = []
    for number, stage in enumerate(job.options.stages):
        name, options = stage["name"], stage["options"]
        if name in DEDUPLICATIONS:
            folder = job.workspace.folder / f"{number}_{name}"
            before = _chain([read, *builders])
            make = _exact if name == "exact_dedup" else _minhash
            phases, last = make(folder, before, options, len(job.shards))
            plan.phases += phases
        else:
            last = _filter_builder(name, options)
        _built(name, last)  # a mistake is found now, not in a task
        builders.append(last)
    plan.filters = _chain(builders)
    return plan


def _chain(builders: list[Callable[[], Steps]]) -> Callable[[], Steps]:
    chosen = list(builders)
    return lambda: [step for build in chosen for step in build()]


def _built(name: str, build: Callable[[], Steps]) -> Steps:
    try:
        return build()
    except ImportError as error:
        raise UserError(
            f"the stage {name} needs packages that are not installed ({error}): install the extra "
            "'corpora' of this package"
        ) from error
    except (TypeError, ValueError) as error:
        raise UserError(f"the stage {name} does not take its options: {error}") from error


def _filter_builder(name: str, options: dict[str, Any]) -> Callable[[], Steps]:
    def build() -> Steps:
        from datatrove.pipeline import filters

        from samba_megatron.data.preprocessing.steps import AddressFilter, LengthFilter

        if name == "language":
            return [_language(**options)]
        kind = {
            "length": LengthFilter,
            "url": AddressFilter,
            "gopher_repetition": filters.GopherRepetitionFilter,
            "gopher_quality": filters.GopherQualityFilter,
            "c4": filters.C4QualityFilter,
            "fineweb": filters.FineWebQualityFilter,
        }[name]
        return [kind(**options)]

    return build


def _language(model: str, languages: list[str], threshold: float = 0.65) -> Any:
    """datatrove's language filter, with the model from a local file: nothing is downloaded."""
    from datatrove.pipeline.filters import LanguageFilter

    if not Path(model).is_file():
        raise UserError(
            f"the stage language finds no model at {model}: fetch a fasttext language model, such "
            "as lid.176.bin, and name its path"
        )
    step = LanguageFilter(languages, threshold)
    step.model.MODEL_URL = str(Path(model).absolute())
    return step


def _exact(
    folder: Path, before: Callable[[], Steps], options: dict[str, Any], tasks: int
) -> tuple[list[Phase], Callable[[], Steps]]:
    if options:
        raise UserError(f"the stage exact_dedup has no options, but got {', '.join(options)}")

    def config() -> Any:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig

        return ExactDedupConfig(content_getter=text_of_document)

    def sign() -> Steps:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupSignature

        return [*before(), ExactDedupSignature(str(folder / "signatures"), config())]

    def find() -> Steps:
        from datatrove.pipeline.dedup.exact_dedup import ExactFindDedups

        where = str(folder / "signatures"), str(folder / "duplicates")
        return [ExactFindDedups(*where, config())]

    def drop() -> Steps:
        from datatrove.pipeline.dedup.exact_dedup import ExactDedupFilter

        (folder / "duplicates").mkdir(parents=True, exist_ok=True)
        return [ExactDedupFilter(str(folder / "duplicates"), config())]

    name = folder.name
    return [Phase(f"{name}_sign", sign, tasks), Phase(f"{name}_find", find, 1)], drop


def text_of_document(document: Any) -> str:
    """What exact deduplication compares."""
    return document.text


def _minhash(
    folder: Path, before: Callable[[], Steps], options: dict[str, Any], tasks: int
) -> tuple[list[Phase], Callable[[], Steps]]:
    language = options.get("language", "eng")
    settings = {name: value for name, value in options.items() if name != "language"}

    def config() -> Any:
        from datatrove.pipeline.dedup.minhash import MinhashConfig

        return MinhashConfig(**settings)

    def sign() -> Steps:
        from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

        step = MinhashDedupSignature(str(folder / "signatures"), config(), language)
        return [*before(), step]

    def bucket() -> Steps:
        from datatrove.pipeline.dedup.minhash import MinhashDedupBuckets

        where = str(folder / "signatures"), str(folder / "buckets")
        return [MinhashDedupBuckets(*where, config=config())]

    def cluster() -> Steps:
        from datatrove.pipeline.dedup.minhash import MinhashDedupCluster

        return [MinhashDedupCluster(str(folder / "buckets"), str(folder / "remove"), config())]

    def drop() -> Steps:
        from datatrove.pipeline.dedup.minhash import MinhashDedupFilter

        config()  # its mistakes are the stage's
        return [MinhashDedupFilter(str(folder / "remove"))]

    name, buckets = folder.name, int(settings.get("num_buckets", 14))
    phases = [
        Phase(f"{name}_sign", sign, tasks),
        Phase(f"{name}_buckets", bucket, buckets),
        Phase(f"{name}_cluster", cluster, 1),
    ]
    return phases, drop
