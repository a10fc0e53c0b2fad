"""What is wrong with inputs or the disk is named and counted, never a silently wrong dataset."""

import json
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from samba_megatron.data.manifest import read_manifest
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError

ROOT = Path(__file__).parents[3]
MEGATRON = Path(__file__).parent / "megatron"


@pytest.fixture
def options(tokenizer_folder, tmp_path) -> PreprocessOptions:
    prefix = str(tmp_path / "out" / "text")
    return PreprocessOptions([str(tmp_path / "text.jsonl")], str(tokenizer_folder), prefix)


@pytest.mark.parametrize("kind", ["uint16", "int32"])
@pytest.mark.parametrize("engine", ["auto", "huggingface"])
def test_bytes_equal_those_that_megatron_wrote(kind, engine, tmp_path):
    """Stored: made by Megatron's builder from Hugging Face's tokens of the stored documents."""
    source, folder = MEGATRON / "documents.jsonl", MEGATRON / kind
    prefix = str(tmp_path / "text_document")
    preprocess(PreprocessOptions([str(source)], str(folder), prefix, engine=engine))
    for ending in ("bin", "idx"):
        written = Path(f"{prefix}.{ending}").read_bytes()
        assert written == (folder / f"text_document.{ending}").read_bytes()
    assert IndexedDataset(prefix)[0].dtype == np.dtype(kind)


BAD = [
    b'{"text": "unfinished',
    b'{"body": "other key"}',
    b'{"text": ["no", "string"]}',
    b'{"text": "caf\xe9"}',
    b'{"text": "\\ud800 alone"}',
    b'{"text": ""}',
]
GOOD = ["plain", "CR LF\r\n", "NUL \x00 inside", "after\u2028separators\x85", "\ufeffmark"]


def test_every_kind_of_bad_line_is_counted_and_the_good_ones_are_exact(options):
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    mixed = [line for pair in zip(lines, BAD[:5], strict=True) for line in pair] + BAD[5:]
    Path(options.inputs[0]).write_bytes(b"\r\n".join(mixed) + b"\r\n")
    report = preprocess(replace(options, on_error="skip"))
    assert report.skipped == {
        "malformed JSON": 2,
        "no text under the key": 1,
        "text is not a string": 1,
        "text is not valid Unicode": 1,
        "empty document": 1,
    }
    places = [example.rsplit(":", 2)[1] for example in report.skipped_examples]
    assert places == ["2", "4", "6", "8", "10", "11"]
    tokenizer = load_tokenizer(options.tokenizer)
    loaded = IndexedDataset(options.output_prefix)
    assert [tokenizer.decode(row[:-1].tolist()) for row in loaded] == GOOD
    manifest = read_manifest(options.output_prefix)
    assert manifest is not None
    assert manifest.counts["skipped"] == dict(report.skipped)
    assert manifest.counts["skipped_examples"] == report.skipped_examples


def test_a_number_of_bad_lines_can_be_allowed(options):
    Path(options.inputs[0]).write_bytes(b'{"text": "fine"}\n' + b"\n".join(BAD[:3]) + b"\n")
    with pytest.raises(UserError, match=r"text\.jsonl:4: text is not a string.*after .*:2: malf"):
        preprocess(replace(options, max_errors=2))
    report = preprocess(replace(options, max_errors=3))
    assert (report.documents, report.skipped.total()) == (1, 3)


def test_the_number_allowed_is_of_all_shards_together(options, corpus):
    content = (corpus / "train.jsonl").read_bytes()
    Path(options.inputs[0]).write_bytes((content + BAD[0] + b"\n") * 2)
    sharded = replace(options, shard_bytes=2 << 20, max_errors=1, workers=2)
    with pytest.raises(UserError, match="2 places hold no usable document, more than"):
        preprocess(sharded)
    assert not Path(f"{options.output_prefix}.manifest.json").exists()
    report = preprocess(replace(sharded, max_errors=2))
    assert report.shards_kept == report.shards


texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=8)


@settings(max_examples=25)
@given(texts=texts, noise=st.lists(st.binary(max_size=20), max_size=4), append_eod=st.booleans())
def test_whatever_lies_between_the_good_lines_comes_back(
    texts, noise, append_eod, tokenizer_folder, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("fuzz")
    noise = [b"#" + line.replace(b"\n", b"") for line in noise]
    lines = [json.dumps({"text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    raw = [line.encode() for line in lines]
    mixed = [
        line
        for i in range(max(len(raw), len(noise)))
        for line in (*raw[i : i + 1], *noise[i : i + 1])
    ]
    (folder / "a.jsonl").write_bytes(b"\n".join(mixed))
    options = PreprocessOptions(
        [str(folder / "a.jsonl")],
        str(tokenizer_folder),
        str(folder / "a"),
        on_error="skip",
        append_eod=append_eod,
    )
    expected = [text for text in texts if text]
    if not expected:
        with pytest.raises(UserError, match="hold no documents"):
            preprocess(options)
        return
    report = preprocess(options)
    assert report.skipped.total() == len(noise) + len(texts) - len(expected)
    tokenizer = load_tokenizer(tokenizer_folder)
    loaded = IndexedDataset(str(folder / "a"))
    end = -1 if append_eod else None
    assert [tokenizer.decode(row[:end].tolist()) for row in loaded] == expected


def test_a_document_of_tens_of_megabytes_is_one_document(options, corpus):
    text = "\n".join(json.loads(line)["text"] for line in (corpus / "train.jsonl").open()) * 14
    rows = [{"text": "before"}, {"text": text}, {"text": "after"}]
    Path(options.inputs[0]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(text) > 40e6
    report = preprocess(options)
    assert (report.documents, report.text_bytes) == (3, len(text.encode()) + 11)
    loaded = IndexedDataset(options.output_prefix)
    start = load_tokenizer(options.tokenizer).encode(text[:1000])[:-5]
    assert loaded[1][: len(start)].tolist() == start


def run(options: PreprocessOptions, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command, possibly with a limit to the size of any file it writes."""
    tool = str(ROOT / "tools" / "preprocess_corpus.py")
    command = [sys.executable, tool, "--input", *options.inputs, "--tokenizer", options.tokenizer]
    command += ["--output-prefix", options.output_prefix, "--shard-size", "1"]
    limits = (limit, limit) if limit else None
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=limits and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)),
    )


def test_no_room_is_said_and_what_is_finished_is_kept(options, corpus):
    content = (corpus / "train.jsonl").read_bytes()
    Path(options.inputs[0]).write_bytes(content)
    failed = run(options, limit=200_000)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert f"cannot write {options.output_prefix}: " in failed.stderr
    assert "run the same command again" in failed.stderr
    assert not list(Path(options.output_prefix).parent.glob(".*"))
    done = run(options)
    assert done.returncode == 0, done.stderr


def test_no_permission_is_said(options):
    """In a folder where not even root may make one."""
    Path(options.inputs[0]).write_bytes(b'{"text": "x"}\n')
    with pytest.raises(UserError, match="cannot write .*(Permission denied|not permitted)"):
        preprocess(replace(options, output_prefix="/sys/kernel/samba/text"))


def test_a_place_that_is_no_folder_is_said(options, tmp_path):
    Path(options.inputs[0]).write_bytes(b'{"text": "x"}\n')
    (tmp_path / "out").write_text("a file")
    with pytest.raises(UserError, match="cannot write .*out/text"):
        preprocess(options)
