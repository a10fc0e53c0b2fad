"""A corpus becomes the same dataset with any number of workers, and only when it should."""

import gzip
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.preprocessing import encoding, executors
from samba_megatron.data.preprocessing.encoding import Engine
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError


@pytest.fixture
def options(write_jsonl, tokenizer_folder, tmp_path) -> PreprocessOptions:
    """Three small documents."""
    source = write_jsonl({"text": "one"}, {"text": "two words"}, {"text": "three"})
    return PreprocessOptions([str(source)], str(tokenizer_folder), str(tmp_path / "out/dataset"))


def outputs(prefix: str) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ("bin", "idx")]


def manifest(prefix: str) -> dict:
    return json.loads(Path(f"{prefix}.manifest.json").read_text())


def test_bytes_equal_megatrons_for_hugging_faces_tokens(
    corpus, tokenizer_folder, dataset, tmp_path
):
    tokenizer = load_tokenizer(tokenizer_folder)
    builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=np.uint16)
    for text in read_texts([corpus / "train.jsonl"], "text"):
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{tmp_path}/theirs.idx")
    assert outputs(dataset) == outputs(f"{tmp_path}/theirs")


def test_the_output_does_not_depend_on_workers_shards_engine_or_compression(
    corpus, tokenizer_folder, dataset, tmp_path
):
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress((corpus / "train.jsonl").read_bytes(), 1))
    common = PreprocessOptions([str(corpus / "train.jsonl")], str(tokenizer_folder), "")
    for number, options in enumerate(
        [
            common,
            replace(common, inputs=[str(packed)], workers=2),
            replace(common, workers=2, engine="huggingface", shard_bytes=1 << 20, merge=True),
            replace(common, shard_bytes=1 << 20, merge=True),
        ]
    ):
        prefix = str(tmp_path / str(number))
        preprocess(replace(options, output_prefix=prefix))
        assert outputs(prefix) == outputs(dataset)


def test_the_report_and_the_manifest_count_what_was_done(options, tokenizer_folder):
    report = preprocess(options)
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = [len(tokenizer.encode(text)) + 1 for text in ("one", "two words", "three")]
    assert (report.documents, report.tokens, report.text_bytes) == (3, sum(expected), 17)
    assert report.engine is Engine.GIGATOKEN
    assert report.warnings == []
    written = manifest(options.output_prefix)
    assert written["counts"]["tokens"] == sum(expected)
    assert written["tokenizer"]["identity"] == tokenizer.identity
    assert written["inputs"][0]["size"] == os.path.getsize(options.inputs[0])
    assert written["datasets"][0]["dtype"] == "uint16"
    lengths = [len(row) for row in IndexedDataset(options.output_prefix)]
    assert lengths == expected
    names = sorted(path.name for path in Path(options.output_prefix).parent.iterdir())
    assert names == ["dataset.bin", "dataset.blend.yaml", "dataset.idx", "dataset.manifest.json"]


def test_a_special_token_in_a_text_is_handled_as_hugging_face_does(
    write_jsonl, options, tokenizer_folder
):
    write_jsonl({"text": "a<|endoftext|>b"})
    preprocess(options)
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = [*tokenizer.encode("a"), tokenizer.eod, *tokenizer.encode("b"), tokenizer.eod]
    loaded = IndexedDataset(options.output_prefix)  # its rows do not outlive it
    assert loaded[0].tolist() == expected


def test_running_again_does_nothing(options):
    preprocess(options)
    before = Path(f"{options.output_prefix}.bin").stat().st_mtime_ns
    assert preprocess(options).up_to_date
    assert preprocess(replace(options, overwrite=True, workers=2)).up_to_date
    assert Path(f"{options.output_prefix}.bin").stat().st_mtime_ns == before


def test_a_copied_or_touched_input_is_the_same_input(options, tmp_path):
    preprocess(options)
    os.utime(options.inputs[0], (time.time() + 9, time.time() + 9))
    assert preprocess(options).up_to_date
    moved = tmp_path / "moved.jsonl"
    shutil.copy(options.inputs[0], moved)
    assert preprocess(replace(options, inputs=[str(moved)])).up_to_date


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"append_eod": False}, "append_eod was True, now False"),
        ({"text_key": "body"}, "text_key was 'text', now 'body'"),
        ({"on_error": "skip"}, "on_error was 'fail', now 'skip'"),
    ],
)
def test_other_options_are_refused_by_name(options, change, message):
    preprocess(options)
    before = outputs(options.output_prefix)
    with pytest.raises(UserError, match=f"{message}.*--overwrite"):
        preprocess(replace(options, **change))
    assert outputs(options.output_prefix) == before


def test_other_inputs_are_refused_by_name_and_replaced_on_demand(options, write_jsonl):
    preprocess(options)
    write_jsonl({"text": "two"}, {"text": "one words"}, {"text": "three"})
    with pytest.raises(UserError, match=r"the input .*documents\.jsonl has changed"):
        preprocess(options)
    before = outputs(options.output_prefix)
    assert preprocess(replace(options, overwrite=True)).documents == 3
    assert outputs(options.output_prefix) != before
    more = write_jsonl({"text": "more"}, name="more.jsonl")
    with pytest.raises(UserError, match="there were 1 inputs, now 2"):
        preprocess(replace(options, inputs=[*options.inputs, str(more)]))


def test_another_tokenizer_is_refused(options, tokenizer_folder, tmp_path):
    preprocess(options)
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|padding|>"}))
    with pytest.raises(UserError, match="the tokenizer is another one"):
        preprocess(replace(options, tokenizer=str(other)))


def test_a_foreign_dataset_is_not_replaced(options):
    prefix = Path(options.output_prefix)
    prefix.parent.mkdir()
    Path(f"{prefix}.bin").write_text("precious")
    with pytest.raises(UserError, match=r"dataset\.bin exists without a manifest"):
        preprocess(options)
    assert Path(f"{prefix}.bin").read_text() == "precious"
    assert preprocess(replace(options, overwrite=True)).documents == 3


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_lost_output_is_written_again(options, ending):
    preprocess(options)
    before = outputs(options.output_prefix)
    Path(f"{options.output_prefix}.{ending}").unlink()
    assert not preprocess(options).up_to_date
    assert outputs(options.output_prefix) == before


def test_a_damaged_manifest_is_named(options):
    preprocess(options)
    Path(f"{options.output_prefix}.manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.manifest\.json is not a manifest"):
        preprocess(options)
    assert preprocess(replace(options, overwrite=True)).documents == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"documents\.jsonl:3: malformed JSON: mend the line.*--on-error skip"),
        ("[1]", r":3: not a JSON object"),
        ('{"content": "x"}', r":3: no text under the key: name the key .* --text-key"),
        ('{"text": 1}', r":3: text is not a string"),
        ('{"text": ""}', r":3: empty document: remove the line"),
        ('{"text": "\\ud800"}', r":3: text is not valid Unicode"),
    ],
)
def test_an_unusable_line_is_named_or_skipped(options, write_jsonl, line, message):
    write_jsonl({"text": "a"}, "", line, {"text": "b"}, line)
    with pytest.raises(UserError, match=message):
        preprocess(options)
    assert list(Path(options.output_prefix).parent.iterdir()) == []
    report = preprocess(replace(options, on_error="skip"))
    assert (report.documents, report.blank_lines, report.lines) == (2, 1, 5)
    assert sum(report.skipped.values()) == 2
    assert [place.split(":")[1] for place in report.skipped_examples] == ["3", "5"]
    assert manifest(options.output_prefix)["counts"]["skipped"] == dict(report.skipped)


def test_lines_are_counted_across_batches_and_shards(options, write_jsonl):
    documents = [{"text": "some words " * 20_000}] * 20
    write_jsonl(*documents, "{", *documents)
    with pytest.raises(UserError, match=r"documents\.jsonl:21: malformed"):
        preprocess(options)
    assert list(Path(options.output_prefix).parent.iterdir()) == []
    sharded = replace(options, workers=2, shard_bytes=1 << 20)
    with pytest.raises(UserError, match=r"documents\.jsonl:21: malformed"):
        preprocess(sharded)
    report = preprocess(replace(sharded, on_error="skip", overwrite=True))
    assert report.skipped_examples[0].endswith("documents.jsonl:21: malformed JSON")
    assert (report.shards, report.documents, report.lines) == (9, 40, 41)


def test_inputs_without_documents_are_refused(options, write_jsonl):
    write_jsonl("", "")
    with pytest.raises(UserError, match="the inputs hold no documents, .* was not written"):
        preprocess(options)
    assert list(Path(options.output_prefix).parent.iterdir()) == []


def test_a_difference_between_engines_falls_back_with_a_warning(options, monkeypatch):
    def wrong(tokenizer, threads=False):
        right = encoding._huggingface_encoder(tokenizer)

        def encode(texts):
            ids, lengths = right(texts)
            return ids + np.isin(np.repeat(texts, lengths), [b"two words"]), lengths

        return encode

    monkeypatch.setattr(encoding, "_gigatoken_encoder", wrong)
    report = preprocess(options)
    assert report.engine is Engine.HUGGINGFACE
    assert "other tokens for" in report.warnings[0]
    assert "documents.jsonl:2" in report.warnings[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ["/nowhere.jsonl"]}, "no file matches the input /nowhere.jsonl"),
        ({"tokenizer": "/nowhere"}, "cannot read the tokenizer /nowhere"),
        ({"workers": 0}, "--workers 0: at least 1"),
    ],
)
def test_mistaken_options_are_named(options, change, message):
    with pytest.raises(UserError, match=message):
        preprocess(replace(options, **change))


def test_a_killed_worker_is_explained(options, write_jsonl, monkeypatch):
    write_jsonl(*[{"text": "some words " * 20_000}] * 60)

    def die(executor: object, rank: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(executors, "_run_quietly", die)
    with pytest.raises(UserError, match=r"worker died.*fewer --workers"):
        preprocess(replace(options, workers=2, shard_bytes=1 << 20))
    assert list(Path(options.output_prefix).parent.iterdir()) == []
