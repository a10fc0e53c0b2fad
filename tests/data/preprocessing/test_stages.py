"""datatrove's filters and deduplication between reading and tokenizing, counted and exact."""

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.preprocessing.stages import STAGES, parse_stages, read_stages
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError

PROSE = (
    "The committee met on Tuesday to discuss the new library that the town has been planning for "
    "years, and most of those who came were in favour of it. There was some talk of the cost, "
    "which is higher than it was, but the mayor said that it would be paid with money that had "
    "been put aside. Nobody asked for a vote. The old building is to become a school. A second "
    "meeting will be held in {month}, when {name} is to show the plans. It will be open to all."
)


@pytest.fixture
def options(write_jsonl, tokenizer_folder, tmp_path) -> PreprocessOptions:
    """Prose, an exact and a near copy of it, noise, and short texts, in two files."""
    first = PROSE.format(month="May", name="Ada Lovelace")
    near = PROSE.format(month="May", name="Emmy Noether")
    noise = "$$$ ### " * 40
    rows = [
        {"text": first, "url": "https://example.org/a"},
        {"text": noise, "url": "https://example.org/b"},
        {"text": "too short", "url": "https://example.org/c"},
    ]
    more = [{"text": text, "url": "https://example.net/d"} for text in (first, near)]
    inputs = [write_jsonl(*rows, name="1.jsonl"), write_jsonl(*more, name="2.jsonl")]
    prefix = str(tmp_path / "out" / "text")
    return PreprocessOptions([str(path) for path in inputs], str(tokenizer_folder), prefix)


def texts(options: PreprocessOptions) -> list[str]:
    tokenizer = load_tokenizer(options.tokenizer)
    loaded = IndexedDataset(options.output_prefix)
    return [tokenizer.decode(row[:-1].tolist()) for row in loaded]


def stages(*entries: object) -> list[dict]:
    return parse_stages(list(entries), "the test")


def test_length_limits_keep_order_and_are_counted(options):
    mine = replace(options, stages=stages({"length": {"min_characters": 20}}))
    report = preprocess(mine)
    assert report.documents == 4
    counts = {"total": 5, "forwarded": 4, "dropped": 1, "dropped_short": 1}
    assert report.stages == [{"name": "length", "counts": counts}]
    manifest = read_manifest(options.output_prefix)
    assert manifest is not None
    assert manifest.stages == report.stages
    assert manifest.counts["lines"] == 5
    assert manifest.counts["text_bytes"] == sum(len(text.encode()) for text in texts(mine))
    with pytest.raises(UserError, match="stages was"):
        preprocess(options)


def test_a_pipeline_without_effect_gives_the_bytes_of_none(options, corpus, tmp_path):
    source = [str(corpus / "train.jsonl")]
    plain = replace(options, inputs=source, output_prefix=str(tmp_path / "plain"))
    staged = replace(
        plain,
        output_prefix=str(tmp_path / "staged"),
        stages=stages({"length": {"min_characters": 0}}),
        shard_bytes=1 << 20,
        merge=True,
        workers=2,
    )
    preprocess(plain)
    preprocess(staged)
    for ending in ("bin", "idx"):
        ours, theirs = (Path(f"{tmp_path}/{name}.{ending}") for name in ("plain", "staged"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_exact_deduplication_keeps_one_of_equal_texts(options):
    mine = replace(options, stages=stages("exact_dedup"))
    report = preprocess(mine)
    assert report.documents == 4
    assert len(set(texts(mine))) == 4
    assert report.stages[0]["counts"] == {"total": 5, "dropped": 1, "forwarded": 4}


def test_minhash_keeps_one_of_near_copies_after_the_filters_before_it(options):
    chain = stages({"length": {"min_characters": 20}}, "gopher_quality", "minhash_dedup")
    mine = replace(options, stages=chain)
    report = preprocess(mine)
    assert [stage["counts"]["forwarded"] for stage in report.stages] == [4, 3, 1]
    assert texts(mine)[0].startswith("The committee")


def test_addresses_are_judged(options):
    lists = {"use_integrated_lists": False, "extra_domains": ["example.org"]}
    report = preprocess(replace(options, stages=stages({"url": lists})))
    assert report.stages[0]["counts"]["forwarded"] == report.documents == 2


def test_a_document_without_an_address_is_named(options, write_jsonl):
    write_jsonl({"text": "somewhere"}, name="2.jsonl")
    with pytest.raises(UserError, match=r"2\.jsonl:1 has no 'url' beside its text"):
        preprocess(replace(options, stages=stages({"url": {"use_integrated_lists": False}})))


@pytest.mark.parametrize("name", ["gopher_repetition", "gopher_quality", "c4", "fineweb"])
def test_the_sets_of_rules_run(options, name):
    report = preprocess(replace(options, stages=stages(name)))
    assert report.stages[0]["counts"]["total"] == 5
    assert 1 <= report.documents <= 5


def test_a_stages_file_lists_names_and_options(tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text("- exact_dedup\n- length: {min_characters: 5}\n- c4\n")
    assert [stage["name"] for stage in read_stages(str(path))] == ["exact_dedup", "length", "c4"]
    path.write_text("stages:\n- url:\n")
    assert read_stages(str(path)) == [{"name": "url", "options": {}}]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["gopher"], "there is no stage 'gopher', but url, language"),
        ([{"length": 3}], "the options of length must be names with values"),
        ([{"length": {}, "c4": {}}], "is not a stage's name with its options"),
        ({"length": {}}, "must be a list of stages"),
    ],
)
def test_mistakes_in_the_list_are_named(entries, message):
    with pytest.raises(UserError, match=message):
        parse_stages(entries, "x.yaml")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"length": {"least": 3}}, "the stage length does not take its options: .*least"),
        ({"minhash_dedup": {"grams": 3}}, "the stage minhash_dedup does not take .*grams"),
        ({"language": {"model": "/nowhere", "languages": ["en"]}}, "finds no model at /nowhere"),
        ({"exact_dedup": {"n": 1}}, "exact_dedup has no options"),
    ],
)
def test_mistaken_options_are_named_before_anything_runs(options, entry, message):
    with pytest.raises(UserError, match=message):
        preprocess(replace(options, stages=stages(entry)))
    assert not Path(options.output_prefix).parent.exists() or not list(
        Path(options.output_prefix).parent.iterdir()
    )


def pairwise_words(first: str, second: str) -> list[tuple[str, str]]:
    return list(zip(first.split(), second.split(), strict=True))


def language_model(folder: Path, english: str, german: str) -> Path:
    """A model of fastText's that tells two languages apart by a few words of each.

    Its trainer's main thread reads the loss while another computes it: now and then it sees a NaN
    and gives up, or ends too early. So it is asked until it has learnt.
    """
    import fasttext

    training, path = folder / "languages.txt", folder / "languages.bin"
    words = [(f"__label__en {a}", f"__label__de {b}") for a, b in pairwise_words(english, german)]
    training.write_text("\n".join(line for pair in words for line in pair) * 40)
    wanted = ["__label__en", "__label__de"]
    for _ in range(200):
        with suppress(RuntimeError):
            model = fasttext.train_supervised(
                str(training), epoch=50, dim=8, lr=0.5, thread=1, verbose=0
            )
            told = [model.f.predict(text + "\n", 1, 0.0, "strict")[0] for text in (english, german)]
            if [label for _, label in told] == wanted and min(share for share, _ in told) > 0.8:
                model.save_model(str(path))
                return path
    raise AssertionError("fastText did not learn two languages in 200 attempts")


def test_the_language_filter_takes_a_model_from_a_local_file(options, tmp_path):
    """Trained here on a few words of each language: nothing is downloaded."""
    english, german = "the of and to in that was for", "der die und das nicht mit ein von"
    path = language_model(tmp_path, english, german)
    found = {"model": str(path), "languages": ["en"], "threshold": 0.5}
    source = tmp_path / "mixed.jsonl"
    rows = [{"text": english}, {"text": german}, {"text": f"{english} {english}"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = replace(options, inputs=[str(source)], stages=stages({"language": found}))
    preprocess(mine)
    assert texts(mine) == [english, f"{english} {english}"]


def test_every_stage_is_documented():
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    assert [name for name in STAGES if f"\n- {name}" not in page] == []
