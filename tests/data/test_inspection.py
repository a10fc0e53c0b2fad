"""A whole dataset is found whole, and every kind of damage is found and named."""

import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.data.inspection import inspect_dataset, plot_lengths, read_documents, together
from samba_megatron.data.manifest import DatasetRecord, Manifest, write_manifest
from samba_megatron.platform.errors import UserError

LENGTHS = [3, 0, 1, 8, 5, 100]
HEADER = 34


def write(prefix: Path, lengths: list[int], vocab_size: int = 600) -> str:
    """Documents of ids that count up, with a manifest."""
    ids = np.arange(sum(lengths)) % 500
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(ids, np.array(lengths))
        info = writer.finish()
    record = DatasetRecord(
        name=prefix.name,
        split="train",
        documents=info.documents,
        tokens=info.tokens,
        dtype="uint16",
        max_token_id=int(ids.max()),
        bin_bytes=os.path.getsize(f"{prefix}.bin"),
        idx_bytes=os.path.getsize(f"{prefix}.idx"),
        bin_sha256=hashlib.sha256(Path(f"{prefix}.bin").read_bytes()).hexdigest(),
    )
    write_manifest(prefix, Manifest([], {"vocab_size": vocab_size}, {}, {}, [record]))
    return str(prefix)


@pytest.fixture
def prefix(tmp_path) -> str:
    return write(tmp_path / "d", LENGTHS)


def change(path: str, offset: int, content: bytes) -> None:
    with open(path, "rb+") as stream:
        stream.seek(offset)
        stream.write(content)


def test_a_whole_dataset(prefix):
    found = inspect_dataset(prefix)
    assert found.problems == []
    assert (found.documents, found.tokens, found.largest_id) == (6, 117, 116)
    assert found.quantiles["shortest"] == 0
    assert found.quantiles["longest"] == 100
    assert found.histogram[:3] == [(0, 1, 1, 0), (1, 2, 1, 1), (2, 4, 1, 3)]
    assert found.histogram[-1] == (64, 128, 1, 100)
    assert any("hash" in text for text in found.checked)
    assert not any("hash" in text for text in inspect_dataset(prefix, read_tokens=False).checked)


@settings(max_examples=30)
@given(lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=40))
def test_counts_are_right(tmp_path_factory, lengths):
    lengths[0] = max(lengths[0], 1)
    found = inspect_dataset(write(tmp_path_factory.mktemp("d") / "d", lengths))
    assert found.problems == []
    assert (found.documents, found.tokens) == (len(lengths), sum(lengths))
    assert sum(documents for _, _, documents, _ in found.histogram) == len(lengths)
    for start, end, documents, tokens in found.histogram:
        inside = [length for length in lengths if start <= length < end]
        assert (documents, tokens) == (len(inside), sum(inside))
    assert found.quantiles["median"] in lengths


@pytest.mark.parametrize(
    ("ending", "offset", "content", "problem"),
    [
        ("bin", 0, b"\xff\xff", "token id 65535, outside the vocabulary of 600"),
        ("bin", 0, b"\x05\x00", "its hash differs"),
        ("bin", 234, b"xx", "has 236 bytes, its index describes 234"),
        ("idx", 0, b"NOTINDEX", "is not a Megatron index file"),
        ("idx", HEADER, struct.pack("<i", -1), "a document of negative length"),
        ("idx", HEADER, struct.pack("<i", 4), "sequence 1 does not begin where"),
        ("idx", HEADER + 24 + 16, struct.pack("<q", 2), "sequence 2 does not begin where"),
        ("idx", HEADER + 72 + 8, struct.pack("<q", 5), "documents are not in order"),
        ("idx", HEADER + 72 + 56, b"more", "has 166 bytes, its header says 162"),
    ],
)
def test_damage_is_found(prefix, ending, offset, content, problem):
    change(f"{prefix}.{ending}", offset, content)
    assert any(problem in sentence for sentence in inspect_dataset(prefix).problems)


def test_truncation_is_found(prefix):
    for ending, problem in (("bin", "has 230 bytes, its index"), ("idx", "is truncated")):
        os.truncate(f"{prefix}.{ending}", os.path.getsize(f"{prefix}.{ending}") - 4)
        assert problem in inspect_dataset(prefix).problems[0]


def test_another_datasets_manifest_is_found(prefix, tmp_path):
    other = write(tmp_path / "other", [5, 5])
    for ending in ("bin", "idx"):
        os.replace(f"{other}.{ending}", f"{prefix}.{ending}")
    problems = " ".join(inspect_dataset(prefix).problems)
    assert "says documents 6, and it is 2" in problems
    assert "its hash differs" in problems
    os.replace(f"{other}.manifest.json", f"{prefix}.manifest.json")
    assert "does not describe this dataset" in inspect_dataset(prefix).problems[0]


def test_the_vocabulary_may_be_given(prefix):
    assert inspect_dataset(prefix, vocab_size=117).problems == []
    assert "outside the vocabulary of 116" in inspect_dataset(prefix, vocab_size=116).problems[0]


def test_documents_by_number(prefix):
    found = read_documents(prefix, [0, 1, 5])
    assert [ids.tolist() for ids in found.values()] == [[0, 1, 2], [], list(range(17, 117))]
    with pytest.raises(UserError, match="has no document 6: it has 6, counted from 0"):
        read_documents(prefix, [6])


def test_a_missing_dataset_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="does not exist: give the prefix"):
        inspect_dataset(str(tmp_path / "no"))
    (tmp_path / "no_00000.idx").touch()
    with pytest.raises(UserError, match=r"give its blend file .*no.blend.yaml"):
        inspect_dataset(str(tmp_path / "no"))


def test_the_plot_is_a_picture(prefix, tmp_path):
    histogram = together([inspect_dataset(prefix)] * 2)
    assert histogram[-1] == (64, 128, 2, 200)
    plot_lengths(histogram, tmp_path / "lengths.png", "d")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        plot_lengths(histogram, tmp_path / "no" / "lengths.png", "d")
