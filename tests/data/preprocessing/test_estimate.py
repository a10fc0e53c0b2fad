"""A dry run says about what a run would make, and makes nothing."""

from dataclasses import replace

import pytest

from samba_megatron.data.preprocessing import estimate as estimate_module
from samba_megatron.data.preprocessing.estimate import estimate
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.progress import in_words
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.platform.errors import UserError


@pytest.fixture
def options(corpus, tokenizer_folder, tmp_path) -> PreprocessOptions:
    prefix = str(tmp_path / "out" / "text")
    return PreprocessOptions([str(corpus / "train.jsonl")], str(tokenizer_folder), prefix)


def number(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def test_the_estimate_is_near_and_nothing_is_written(options, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_module, "_POINT_BYTES", 1 << 16)
    rows = estimate(replace(options, shard_bytes=1 << 20))
    assert not (tmp_path / "out").exists()
    assert rows["shards"] == "3"
    report = preprocess(options)
    assert number(rows["tokens, about"]) == pytest.approx(report.tokens, rel=0.3)
    assert rows["engine"] == "gigatoken"


def test_what_would_stop_a_run_stops_the_estimate(options):
    with pytest.raises(UserError, match="the sample holds no usable document: check --text-key"):
        estimate(replace(options, text_key="body"))


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.2, "4 s"), (310, "5 min 10 s"), (12_000, "3 h 20 min"), (216_000, "2.5 days")],
)
def test_durations_in_words(seconds, words):
    assert in_words(seconds) == words
