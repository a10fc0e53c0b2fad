"""Whatever happens to a blend, no source repeats or loses a sample, and shares are kept."""

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.data.blend_order import (
    BlendExhausted,
    BlendOrder,
    BlendWalker,
    Plan,
    PlanStage,
    Position,
    from_ledger,
    phase_shares,
    project,
    to_ledger,
    whole_shares,
)

weights = st.floats(1e-6, 1e6) | st.sampled_from([0.1, 1.0, 1 / 3, 0.0])


@st.composite
def plans(draw, sources: int | None = None) -> Plan:
    """Up to three stages over some sources, some of them capped."""
    count = sources or draw(st.integers(1, 8))
    ends = sorted(draw(st.sets(st.integers(1, 300), max_size=2)))
    some = st.lists(weights, min_size=count, max_size=count).filter(lambda w: sum(w) > 0)
    stages = tuple(PlanStage(end, whole_shares(draw(some))) for end in [*ends, None])
    limits = draw(
        st.lists(st.none() | st.integers(1, 120), min_size=count, max_size=count).map(tuple)
    )
    return Plan(stages, limits)


def take(walker: BlendWalker, count: int) -> list[tuple[int, int]]:
    """The next samples, or as many as there are."""
    found: list[tuple[int, int]] = []
    try:
        for _ in range(count):
            found += zip(*walker.take(1), strict=True)
    except BlendExhausted:
        pass
    return found


def everything(plan: Plan, count: int) -> list[tuple[int, int]]:
    """The first samples of a plan, one by one, to its end at the latest."""
    return take(BlendWalker(plan, Position.start(len(plan.limits))), count)


def phases(plan: Plan, samples: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and last sample of each stretch between ends of stages and sources that are full."""
    borders = {0, len(samples)} | {s.end for s in plan.stages if s.end and s.end < len(samples)}
    for index, (source, number) in enumerate(samples):
        if plan.limits[source] == number + 1:
            borders.add(index + 1)
    return list(pairwise(sorted(borders)))


@settings(max_examples=150)
@given(plan=plans())
def test_each_source_gives_its_samples_in_order_and_its_share_to_within_one(plan):
    samples = everything(plan, 400)
    given_of = [0] * len(plan.limits)
    for start, end in phases(plan, samples):
        open_ = [limit is None or n < limit for n, limit in zip(given_of, plan.limits, strict=True)]
        shares = np.where(open_, np.array(plan.stage_at(start).shares, float), 0.0)
        shares /= shares.sum()
        before = np.array(given_of)
        for index in range(start, end):
            source, number = samples[index]
            assert number == given_of[source]  # in order: none repeated, none lost
            given_of[source] += 1
            off = np.array(given_of) - before - shares * (index + 1 - start)
            assert np.abs(off).max() < 1 + 1e-9
    for count, limit in zip(given_of, plan.limits, strict=True):
        assert limit is None or count <= limit


@settings(max_examples=60)
@given(plan=plans(), cuts=st.lists(st.integers(0, 90), min_size=1, max_size=8))
def test_a_resumed_blend_is_the_uninterrupted_one(plan, cuts):
    whole = everything(plan, sum(cuts))
    keys = [f"source {number}" for number in range(len(plan.limits))]
    position = Position.start(len(keys))
    found: list[tuple[int, int]] = []
    for cut in cuts:
        cut = min(cut, len(whole) - len(found))
        walker = BlendWalker(plan, position)
        found += zip(*walker.take(cut), strict=True)
        ledger = to_ledger(
            walker.position, phase_shares(plan, walker.position), keys, [k.upper() for k in keys]
        )
        position = from_ledger(json.loads(json.dumps(ledger)), plan, keys)
    assert found == whole


@settings(max_examples=100)
@given(data=st.data(), names=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
def test_a_blend_changed_at_will_repeats_and_loses_nothing(data, names):
    """Weights, stages, caps and the set of sources change at every resume."""
    ledger: dict[str, Any] = {"samples": 0, "origin": 0, "sources": {}}
    positions = dict.fromkeys("abcdef", 0)
    for _ in range(data.draw(st.integers(1, 5))):
        names = data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
        plan = data.draw(plans(sources=len(names)))
        position = from_ledger(ledger, plan, names)
        assert position.counts.tolist() == [positions[name] for name in names]
        try:
            walker = BlendWalker(plan, position)
        except BlendExhausted:
            continue
        for source, number in take(walker, data.draw(st.integers(0, 100))):
            assert number == positions[names[source]]
            positions[names[source]] += 1
        shares = phase_shares(plan, walker.position)
        gone = {key: {**e, "share": 0} for key, e in ledger["sources"].items() if key not in names}
        ledger = to_ledger(walker.position, shares, names, names)
        ledger["sources"] |= gone
        assert ledger["samples"] == sum(positions.values())


@settings(max_examples=30)
@given(plan=plans(), start=st.integers(0, 100), asked=st.lists(st.integers(0, 3000), max_size=12))
def test_any_sample_can_be_asked_for(plan, start, asked):
    whole = everything(plan, 3001)
    start = min(start, len(whole))
    walker = BlendWalker(plan, Position.start(len(plan.limits)))
    take(walker, start)
    order = BlendOrder(plan, walker.position)
    for sample in asked:
        if sample < start:
            with pytest.raises(IndexError):
                order.locate(sample)
        elif sample >= len(whole):
            with pytest.raises(BlendExhausted) as end:
                order.locate(sample)
            assert end.value.samples == len(whole)
        else:
            assert order.locate(sample) == whole[sample]
            counts = np.bincount([s for s, _ in whole[:sample]], minlength=len(plan.limits))
            assert order.position_at(sample).counts.tolist() == counts.tolist()


@settings(max_examples=80)
@given(plan=plans(), end=st.integers(1, 600))
def test_the_projection_is_what_happens(plan, end):
    samples = everything(plan, end)
    found = project(plan, Position.start(len(plan.limits)), end)
    counts = np.bincount([source for source, _ in samples], minlength=len(plan.limits))
    slack = 2 * (len(plan.stages) + len(found.used_up)) + 1
    assert abs(found.end - len(samples)) <= slack
    assert np.abs(found.counts - counts).max() <= slack


def test_a_full_source_leaves_its_share_to_the_others():
    plan = Plan((PlanStage(None, whole_shares([0.5, 0.3, 0.2])),), (10, None, None))
    samples = everything(plan, 520)
    full = max(index for index, (source, _) in enumerate(samples) if source == 0) + 1
    assert full <= 20
    after = [sum(s == source for s, _ in samples[full:]) for source in range(3)]
    assert after[0] == 0
    assert abs(after[1] - 0.6 * (520 - full)) < 1


def test_a_blend_of_thousands_is_within_one_sample_too():
    generator = np.random.default_rng(1)
    shares = whole_shares((generator.random(2000) ** 6 + 1e-9).tolist())
    plan = Plan((PlanStage(None, shares),), (None,) * 2000)
    sources, _ = BlendWalker(plan, Position.start(2000)).take(5000)
    counts, target = np.zeros(2000), np.array(shares, float) / sum(shares)
    for index, source in enumerate(sources, 1):
        counts[source] += 1
        assert np.abs(counts - target * index).max() < 1


def test_reading_far_on_keeps_little():
    plan = Plan((PlanStage(None, whole_shares([0.7, 0.3])),), (None, None))
    order = BlendOrder(plan, Position.start(2))
    source, number = order.locate(200_000)
    assert abs(number - (140_000, 60_000)[source]) < 1
    assert len(order._blocks) <= 64
    assert order.locate(3) == everything(plan, 4)[3]
