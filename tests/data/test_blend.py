"""Blends are read as they are written, and a wrong one is named in one sentence."""

from pathlib import Path

import pytest
import yaml

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import (
    Source,
    Stage,
    parse_blend,
    read_blend_files,
    split_fractions,
    training_blend,
    validation_blend,
)
from samba_megatron.platform.errors import UserError


def test_prefixes_alone_or_with_weights():
    assert parse_blend(["a", "b"]).sources == (Source("a", "a"), Source("b", "b"))
    assert parse_blend(["0.3", "a", "0.7", "b"]).own_weights([1, 1]) == [0.3, 0.7]
    assert parse_blend(["a", "b"]).own_weights([10, 30]) == [10, 30]
    assert parse_blend(["2", "a"]).sources == (Source("a", "a", 2.0),)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "data.data_path is empty"),
        (["0.3", "a", "b"], "mixes weights and prefixes"),
        (["0.3", "a", "b", "c"], "mixes weights and prefixes"),
        (["0.3", "0.7"], "mixes weights and prefixes"),
        (["0", "a", "1", "b"], "must be a positive number"),
        (["nan", "a", "1", "b"], "must be a positive number"),
        (["inf", "a", "1", "b"], "must be a positive number"),
        (["a", "./a"], "data.data_path names ./a twice: name it once"),
    ],
)
def test_bad_blends_are_refused(paths, message):
    with pytest.raises(UserError, match=message):
        parse_blend(paths)


def test_splits_are_fractions():
    assert split_fractions("98,2,0") == (0.98, 0.02, 0.0)
    assert split_fractions("1") == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "-1,2", "0,0", "nan,1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(UserError, match=r"data\.split is"):
        split_fractions(split)


@pytest.fixture
def blend(tmp_path):
    """Writes a blend file (YAML text, or what to write as YAML) and gives its path."""

    def write(content: object, name: str = "P.blend.yaml") -> Path:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_blend_file_is_taken_as_it_is(blend, tmp_path):
    path = blend(
        "max_epochs: 4\n"
        "sources:\n"
        "  - {name: web, prefix: shards/web, weight: 0.7, tokens: 12, documents: 2}\n"
        "  - {name: no, prefix: /abs/code, weight: 3e-1, max_epochs: 1.5}\n"
        "  - {prefix: other, weight: 0}\n"
        "stages:\n"
        "  - {until_tokens: 2T}\n"
        "  - {weights: {web: 1, other: 1}}\n"
    )
    found = training_blend(DataConfig(blend_file=[str(path)]))
    assert found.sources == (
        Source("web", str(tmp_path / "shards/web"), 0.7, 4, 12, 2),
        Source("no", "/abs/code", 0.3, 1.5),
        Source("other", str(tmp_path / "other"), 0, 4),
    )
    assert found.stages == (Stage(2 * 10**12), Stage(None, {"web": 1, "other": 1}))


def test_several_files_are_one_blend(blend):
    one = blend({"sources": [{"name": "a", "prefix": "a", "weight": 1}]}, "one.yaml")
    two = blend(
        {
            "sources": [{"name": "b", "prefix": "b", "weight": 3}],
            "stages": [{"until_tokens": 10, "weights": {"a": 1}}],
        },
        "two.yaml",
    )
    found = read_blend_files([one, two])
    assert [source.name for source in found.sources] == ["a", "b"]
    assert found.stage_weights(found.stages[0], [5, 5]) == [1, 0]
    with pytest.raises(UserError, match=r"names a twice"):
        read_blend_files([one, two, one])
    with pytest.raises(UserError, match=r"two.yaml and .*two.yaml both have stages"):
        read_blend_files([two, two])


def test_a_patterns_share_is_divided_by_the_sources_own(blend):
    sources = [{"name": n, "prefix": n, "weight": w} for n, w in (("w1", 1), ("w2", 3), ("c", 1))]
    stages = [{"until_tokens": "1M", "weights": {"w*": 0.8, "c": 0.2}}]
    found = read_blend_files([blend({"sources": sources, "stages": stages})])
    assert found.stage_weights(found.stages[0], [1, 1, 1]) == pytest.approx([0.2, 0.6, 0.2])
    by_tokens = [{"name": s["name"], "prefix": s["prefix"]} for s in sources]
    found = read_blend_files([blend({"sources": by_tokens, "stages": stages})])
    assert found.stage_weights(found.stages[0], [30, 10, 5]) == pytest.approx([0.6, 0.2, 0.2])


A = {"name": "a", "prefix": "a", "weight": 1}
B = {"name": "b", "prefix": "b", "weight": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sources: [", "is not YAML at line"),
        ("sources: []\nsources: []", "sources is given twice"),
        ("- a", "must hold sources, stages, max_epochs"),
        ({"sources": []}, "has no sources"),
        ({"source": [A]}, "has 'source', which is not known: did you mean sources?"),
        ({"sources": ["a"]}, "source 1 of .* is 'a': it must hold name, prefix"),
        ({"sources": [{"name": "a", "weight": 1}]}, "source 1 of .* has no prefix"),
        ({"sources": [{**A, "wieght": 1}]}, "'wieght', which is not known: did you mean weight"),
        ({"sources": [{**A, "prefix": "a.bin"}]}, "give the prefix without the ending, a"),
        ({"sources": [{**A, "weight": -1}]}, "a in .* has the weight -1: it must be a number, 0"),
        ("sources: [{prefix: a, weight: .nan}]", "has the weight nan"),
        ({"sources": [{**A, "weight": "much"}]}, "has the weight much"),
        ({"sources": [{**A, "weight": 0}]}, "the weights in .* are all 0"),
        ({"sources": [A, {"prefix": "b"}]}, "b in .* has no weight and others have"),
        ({"sources": [A, {**B, "name": "a"}]}, "names a twice"),
        ({"sources": [A, {**A, "name": "b"}]}, "names b twice"),
        ({"sources": [{**A, "max_epochs": 0}]}, "has max_epochs 0: it must be a number over 0"),
        ({"sources": [{**A, "tokens": "many"}]}, "has tokens 'many': it must be a whole number"),
        ({"sources": [A], "stages": {"a": 1}}, "stages in .* it must be a list"),
        (
            {"sources": [A], "stages": [{"until_tokens": "2 trillion"}]},
            "until_tokens '2 trillion': it must be a whole number of tokens such as",
        ),
        ({"sources": [A], "stages": [{}, {}]}, "stage 1 of .* has no until_tokens"),
        (
            {"sources": [A], "stages": [{"until_tokens": 5}, {"until_tokens": "5"}]},
            "stage 2 of .* has until_tokens 5, not more than the 5 before it",
        ),
        (
            {"sources": [A, B], "stages": [{"weights": {"bb": 1}}]},
            "names bb, which is no source: did you mean b?",
        ),
        ({"sources": [A], "stages": [{"weights": {"a": 0}}]}, "weights in stage 1 of .* all 0"),
        ({"sources": [A], "stages": [{"weights": {"a": -2}}]}, "has the weight -2"),
        (
            {"sources": [A, B], "stages": [{"weights": {"a": 1, "[a]": 1}}]},
            r"gives a a share under \[a\] and under a: name it once",
        ),
    ],
)
def test_a_wrong_blend_file_is_one_sentence(blend, content, message):
    with pytest.raises(UserError, match=message) as refused:
        read_blend_files([blend(content)])
    assert "\n" not in str(refused.value)


def test_held_out_data_may_be_a_blend_file(blend, tmp_path):
    path = str(blend({"sources": [A, B]}))
    assert validation_blend([path]).prefixes == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert validation_blend(["x", "y"]).prefixes == ["x", "y"]
    with pytest.raises(UserError, match="mixes prefixes with the blend file"):
        validation_blend([path, "x"])


def test_a_missing_file_and_two_ways_at_once_are_named(blend):
    with pytest.raises(UserError, match=r"cannot read the blend file /nowhere.yaml \(No such"):
        read_blend_files(["/nowhere.yaml"])
    path = str(blend({"sources": [A]}))
    with pytest.raises(UserError, match="are both given"):
        training_blend(DataConfig(data_path=["a"], blend_file=[path]))
    with pytest.raises(UserError, match="data.data_path is empty"):
        training_blend(DataConfig())
