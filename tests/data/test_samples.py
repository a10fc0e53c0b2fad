"""Samples of a blend, through whatever layout, interruptions and changes of the blend."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.config.data import DataConfig
from samba_megatron.data.datasets import build_train_and_valid
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.stream import SampleStream
from samba_megatron.platform.errors import UserError

LENGTH = 8
SAMPLES = {"a": 5, "b": 11, "c": 30}
"""Samples an epoch of each source."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three datasets; token = source's first id + sample's number, so that a sample is known."""
    path = tmp_path_factory.mktemp("sources")
    for first, (name, samples) in zip((0, 100, 200), SAMPLES.items(), strict=True):
        with IndexedWriter(path / name, np.uint16) as writer:
            writer.add_document(np.repeat(np.arange(first, first + samples + 1), LENGTH)[:-7])
            writer.finish()
    return path


def build(folder: Path, blend: dict, samples: int, consumed=None):
    file = folder / f"{abs(hash(json.dumps(blend)))}.yaml"
    file.write_text(yaml.safe_dump(blend))
    data = DataConfig(
        blend_file=[str(file)],
        valid_data_path=[str(folder / "a")],
        path_to_cache=str(folder / "cache"),
        sequence_length=LENGTH,
    )
    return build_train_and_valid(data, samples, 0, 7, consumed=consumed)[0]


def blend_of(weights: Mapping[str, float], **more) -> dict:
    sources = [{"name": name, "prefix": name, "weight": w} for name, w in weights.items()]
    return {"sources": sources, **more}


def read(dataset, samples: int, consumed: int, size: int, dp: int, micro: int) -> list[int]:
    """The next ``samples`` samples' tokens in global order, as the ranks of a layout read them."""
    streams = [SampleStream(dataset, micro, rank, dp, consumed, read_ahead=2) for rank in range(dp)]
    found: list[int] = []
    for _ in range(samples // size):
        ranks = [list(stream.next_global_batch(size)) for stream in streams]
        for micros in zip(*ranks, strict=True):
            found += [int(token) for batch in micros for token in batch["tokens"][:, 0]]
    for stream in streams:
        stream.close()
    return found


LAYOUTS = [(1, 4), (2, 2), (4, 1), (2, 1), (1, 2)]


@settings(max_examples=25)
@given(
    cuts=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(LAYOUTS)), min_size=1, max_size=5)
)
def test_resuming_in_any_layout_is_the_uninterrupted_run(folder, cuts):
    blend = blend_of(
        {"a": 0.2, "b": 0.5, "c": 0.3},
        stages=[{"until_tokens": 60 * LENGTH}, {"weights": {"c": 2, "b": 1}}],
    )
    total = 4 * sum(steps for steps, _ in cuts)
    whole = read(build(folder, blend, total), total, 0, 4, 1, 4)
    found: list[int] = []
    ledger = None
    for steps, (dp, micro) in cuts:
        dataset = build(folder, blend, total, ledger)
        found += read(dataset, 4 * steps, len(found), 4, dp, micro)
        ledger = json.loads(json.dumps(dataset.ledger(len(found))))
    assert found == whole


@settings(max_examples=25)
@given(
    runs=st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 1), min_size=1),
            st.integers(1, 15),
            st.sampled_from(LAYOUTS),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_source_gives_every_sample_once_an_epoch_however_the_blend_changes(folder, runs):
    taken: list[int] = []
    ledger: dict | None = None
    done = 0
    for weights, steps, (dp, micro) in runs:
        dataset = build(folder, blend_of(weights), done + 4 * steps, ledger)
        taken += read(dataset, 4 * steps, done, 4, dp, micro)
        done += 4 * steps
        ledger = json.loads(json.dumps(dataset.ledger(done)))
    assert ledger is not None
    consumed = {entry["name"]: entry["samples"] for entry in ledger["sources"].values()}
    for first, (name, per_epoch) in zip((0, 100, 200), SAMPLES.items(), strict=True):
        own = [token - first for token in taken if first <= token < first + 100]
        assert len(own) == consumed.get(name, 0)
        for epoch in range(0, len(own), per_epoch):
            part = own[epoch : epoch + per_epoch]
            assert len(set(part)) == len(part)
            assert len(part) < per_epoch or sorted(part) == list(range(per_epoch))


def test_caps_hold_and_are_said_and_a_blend_that_ends_early_is_refused(folder):
    blend = blend_of({"a": 1, "c": 1})
    blend["sources"][0]["max_epochs"] = 2
    dataset = build(folder, blend, 60)
    firsts = [int(dataset[index]["tokens"][0]) for index in range(60)]
    assert sorted(token for token in firsts if token < 100) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    summary = dict(dataset.summary())
    assert summary["a"] == "50.00%, 80 at the end: 2 epochs"
    assert "a reaches max_epochs and its share goes to the others" in summary.values()
    assert dataset.consumed_by_source(60)["a"] == {"samples": 10, "tokens": 80, "epochs": 2.0}
    blend["max_epochs"] = 3
    with pytest.raises(UserError, match="ends after about 800 tokens, .* the run goes on to 808"):
        build(folder, blend, 101)
    assert len(build(folder, blend, 100)) == 100


def test_an_added_source_leaves_the_others_as_they_were(folder):
    alone, both = (build(folder, blend_of(weights), 24) for weights in ({"c": 1}, {"b": 1, "c": 1}))
    inside = [both[i]["tokens"] for i in range(24) if int(both[i]["tokens"][0]) >= 200]
    assert len(inside) == 12
    for index, tokens in enumerate(inside):
        assert np.array_equal(alone[index]["tokens"], tokens)


def open_files(folder: Path) -> int:
    """This process's open files in a folder; what other tests have left open is elsewhere."""
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one of this listing has gone, and others may go meanwhile
            found += Path(os.readlink(descriptor)).is_relative_to(folder)
    return found


def test_many_sources_stay_under_the_limit_on_open_files(tmp_path):
    for number in range(220):
        with IndexedWriter(tmp_path / f"d{number}", np.uint16) as writer:
            writer.add_document(np.full(20, number))
            writer.finish()
    prefixes = [str(tmp_path / f"d{number}") for number in range(220)]
    data = DataConfig(prefixes, sequence_length=4, split="1")
    dataset, _ = build_train_and_valid(replace(data, path_to_cache=str(tmp_path)), 880, 0, 1)
    assert open_files(tmp_path) == 0
    sources = [int(dataset[index]["tokens"][0]) for index in range(880)]
    assert sorted(sources) == sorted([*range(220)] * 4)
    assert 0 < open_files(tmp_path) < 400
