"""Training and validation samples from indexed datasets: blends, splits and their cached order.

Rank 0 looks at the datasets, finds the user's mistakes before the others wait, and builds what the
cache lacks; the others are told, and map.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import (
    Blend,
    Source,
    Stage,
    parse_blend,
    split_fractions,
    training_blend,
    validation_blend,
)
from samba_megatron.data.blend_order import (
    BlendExhausted,
    Plan,
    PlanStage,
    Projection,
    project,
    whole_shares,
)
from samba_megatron.data.catalogue import Catalogue, Facts
from samba_megatron.data.loss_masks import has_mask
from samba_megatron.data.sample_index import OrderCache, SourcePart, Stored
from samba_megatron.data.samples import (
    BlendedSamples,
    SampleOptions,
    SourceReader,
    start_position,
)
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError

_STORED_EPOCHS = 16
"""Epochs of a source made at the start; a source that is read more often is small, and its further
orders are made when they are reached."""


@dataclass
class _Side:
    """The training or the validation samples, as rank 0 has settled them."""

    parts: list[SourcePart]
    plan: Plan
    length: int
    consumed: Mapping[str, Any] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)


def build_train_and_valid(
    data: DataConfig,
    train_samples: int,
    valid_samples: int,
    random_seed: int,
    vocab_size: int | None = None,
    consumed: Mapping[str, Any] | None = None,
) -> tuple[BlendedSamples, BlendedSamples | None]:
    """Builds the samples of a run, going through the sources as often as is needed.

    Collective: with torch.distributed initialised every rank calls it, rank 0 builds the indices
    and the others map them from ``data.path_to_cache``. Without it, it just builds.

    Args:
        data: which datasets. Without ``path_to_cache`` the indices are kept in a folder
            ``index_cache`` beside the first dataset.
        train_samples: training samples of the whole run.
        valid_samples: validation samples; 0 for none.
        random_seed: decides the order of documents and samples.
        vocab_size: the model's; a dataset with ids outside it is refused.
        consumed: the ledger of the checkpoint that the run goes on from
            (:meth:`~samba_megatron.data.samples.BlendedSamples.ledger`).

    Returns:
        Training and validation samples (the second None if not asked for). A sample depends on
        the data, the seed, the blend and its number alone.

    Raises:
        UserError: on every rank, if a dataset is missing, damaged or too small, settings contradict
            each other, or the blend ends before the run.
    """
    options = _options(data, random_seed)
    sides = on_first_rank(
        lambda: _settle(data, options, train_samples, valid_samples, vocab_size, consumed)
    )
    train, valid = (_samples(side, options, data) if side else None for side in sides)
    assert train is not None
    return train, valid


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Does ``work`` on rank 0 and gives its result to all; a UserError is raised on all."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return work()
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    distributed.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return result


def cache_folder(data: DataConfig) -> Path:
    """The index cache of a run."""
    if data.path_to_cache:
        return Path(data.path_to_cache)
    first = data.blend_file[0] if data.blend_file else parse_blend(data.data_path).prefixes[0]
    return Path(first).absolute().parent / "index_cache"


def known_sources(blend: Blend, catalogue: Catalogue, vocab_size: int | None = None) -> list[Facts]:
    """The facts of a blend's datasets, compared with what its file says of them.

    Raises:
        UserError: a dataset is missing or damaged, is not what the file says, or is there twice.
    """
    found = catalogue.facts(blend.prefixes, vocab_size)
    seen: dict[str, str] = {}
    for source, facts in zip(blend.sources, found, strict=True):
        _check_said(source, facts, blend.place)
        if facts.fingerprint in seen:
            raise UserError(
                f"{seen[facts.fingerprint]} and {source.prefix} in {blend.place} hold the same "
                "data: name one of them, with the sum of the weights"
            )
        seen[facts.fingerprint] = source.prefix
    return found


def _check_said(source: Source, facts: Facts, place: str) -> None:
    for what in ("tokens", "documents"):
        said, there = getattr(source, what), getattr(facts, what)
        if said is not None and said != there:
            raise UserError(
                f"{place} says that {source.name} has {said} {what}, and the dataset "
                f"{source.prefix} has {there}: write the blend file again"
            )


def _settle(
    data: DataConfig,
    options: SampleOptions,
    train_samples: int,
    valid_samples: int,
    vocab_size: int | None,
    consumed: Mapping[str, Any] | None,
) -> tuple[_Side, _Side | None]:
    """Checks all datasets, settles the plan, and builds the orders that the cache lacks."""
    catalogue = Catalogue(cache_folder(data))
    until, valid_until = (1.0, 1.0) if data.valid_data_path else _parts(data, valid_samples)
    blend = training_blend(data)
    facts = known_sources(blend, catalogue, vocab_size)
    if data.loss_masks and not any(has_mask(prefix) for prefix in blend.prefixes):
        raise UserError(
            f"data.loss_masks is set, and no dataset in {blend.place} has one: make them with "
            "preprocess_corpus.py --completion-key or --messages-key, or leave it out"
        )
    parts = _cut(catalogue, blend, facts, (0.0, until), options, "training")
    train = _train_side(blend, parts, options, train_samples, consumed or {})
    valid = None
    if valid_samples:
        within = (until, valid_until)
        if data.valid_data_path:
            blend = validation_blend(data.valid_data_path)
            facts = known_sources(blend, catalogue, vocab_size)
            within = (0.0, 1.0)
        parts = _cut(catalogue, blend, facts, within, options, "validation")
        shares = whole_shares(blend.own_weights([part.tokens for part in parts]))
        plan = Plan((PlanStage(None, shares),), (None,) * len(parts))
        valid = _Side(parts, plan, valid_samples)
    catalogue.save()
    sides = [side for side in (train, valid) if side is not None]
    needed = [order for side in sides for order in _needed(side, options)]
    cache = OrderCache(cache_folder(data))
    stored = cache.ensure(needed, options.sequence_length, options.seed)
    for side in sides:
        side.stored = stored
    return train, valid


def _train_side(
    blend: Blend,
    parts: list[SourcePart],
    options: SampleOptions,
    samples: int,
    consumed: Mapping[str, Any],
) -> _Side:
    plan = _plan(blend, parts, options.sequence_length)
    start = start_position(plan, parts, consumed)
    _check_lasts(blend, project(plan, start, samples), samples, options.sequence_length)
    return _Side(parts, plan, max(samples, start.samples), consumed)


def _check_lasts(blend: Blend, projection: Projection, samples: int, sequence_length: int) -> None:
    if projection.end < samples:
        raise UserError(
            f"the blend {blend.place} ends after about {projection.end * sequence_length} tokens, "
            "where all its sources have reached max_epochs, and the run goes on to "
            f"{samples * sequence_length}: raise max_epochs, add sources or shorten the run"
        )


def _plan(blend: Blend, parts: Sequence[SourcePart], sequence_length: int) -> Plan:
    """Stages in samples, shares as integers, caps in samples."""
    tokens = [part.tokens for part in parts]
    stages = list(blend.stages)
    if not stages or stages[-1].until_tokens is not None:
        stages.append(Stage())
    limits = tuple(
        None
        if source.max_epochs is None
        else max(1, math.floor(source.max_epochs * part.samples_per_epoch(sequence_length)))
        for source, part in zip(blend.sources, parts, strict=True)
    )
    return Plan(
        tuple(
            PlanStage(
                None if stage.until_tokens is None else -(-stage.until_tokens // sequence_length),
                whole_shares(blend.stage_weights(stage, tokens)),
            )
            for stage in stages
        ),
        limits,
    )


def _needed(side: _Side, options: SampleOptions) -> list[tuple[SourcePart, int]]:
    """The epochs of each source that the rest of the run reads."""
    start = start_position(side.plan, side.parts, side.consumed)
    projected = project(side.plan, start, side.length)
    slack = 2 * (len(side.plan.stages) + len(projected.used_up))
    needed = []
    for number, part in enumerate(side.parts):
        first, last = int(start.counts[number]), int(projected.counts[number])
        if last == first:
            continue
        last += slack
        limit = side.plan.limits[number]
        last = last if limit is None else min(last, limit)
        per_epoch = part.samples_per_epoch(options.sequence_length)
        epochs = range(first // per_epoch, -(-last // per_epoch))
        needed += [(part, epoch) for epoch in epochs[:_STORED_EPOCHS]]
    return needed


def _samples(side: _Side, options: SampleOptions, data: DataConfig) -> BlendedSamples:
    reader = SourceReader(side.parts, options, OrderCache(cache_folder(data)), side.stored)
    try:
        return BlendedSamples(reader, side.plan, side.length, side.consumed)
    except BlendExhausted:
        raise UserError(
            "all sources of the blend have reached max_epochs: raise it or add sources"
        ) from None


def _parts(data: DataConfig, valid_samples: int) -> tuple[float, float]:
    """Where in each dataset the training part and the validation part end."""
    train, valid, _ = split_fractions(data.split)
    if valid_samples and not valid:
        raise UserError(
            f'data.split is "{data.split}", which leaves nothing for validation: give it a second '
            "part, or set data.valid_data_path"
        )
    if not train:
        raise UserError(f'data.split is "{data.split}", which leaves nothing for training')
    return train, train + valid


def _cut(
    catalogue: Catalogue,
    blend: Blend,
    facts: Sequence[Facts],
    within: tuple[float, float],
    options: SampleOptions,
    use: str,
) -> list[SourcePart]:
    """The part of each dataset for ``use``; refuses one that is shorter than a sample."""
    parts = []
    for source, known in zip(blend.sources, facts, strict=True):
        first, last = (round(end * known.sequences) for end in within)
        tokens = catalogue.part_tokens(known, first, last)
        if tokens < options.sequence_length + 1:
            raise UserError(
                f"the dataset {known.prefix} has {tokens} tokens for {use}, fewer than one sample "
                f"of sequence_length {options.sequence_length} + 1: use a larger dataset, another "
                "split or shorter sequences"
            )
        packed = None
        if options.packing == "best_fit":
            packed = catalogue.part_packed(known, first, last, options.sequence_length)
            if not packed.samples:
                raise UserError(f"the dataset {known.prefix} has no document of two tokens")
        parts.append(
            SourcePart(source.name, known.prefix, known.fingerprint, first, last, tokens, packed)
        )
    return parts


def _options(data: DataConfig, seed: int) -> SampleOptions:
    if data.eod_mask_loss and not data.tokenizer:
        raise UserError(
            "data.eod_mask_loss needs to know the end-of-document token: set data.tokenizer"
        )
    eod = load_tokenizer(data.tokenizer).eod if data.tokenizer else -1
    return SampleOptions(
        sequence_length=data.sequence_length,
        seed=seed,
        packing=data.packing,
        reset_at_document_boundaries=data.reset_at_document_boundaries,
        eod_mask_loss=data.eod_mask_loss,
        eod=eod,
        loss_masks=data.loss_masks,
    )
