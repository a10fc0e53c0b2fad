"""Reading JSON lines: whole lines in any block size, any compression, and every defect named."""

import gzip
import hashlib
import io
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.data.jsonl import (
    Defect,
    HashingReader,
    expand_inputs,
    parse_block,
    read_blocks,
    read_texts,
)
from samba_megatron.platform.errors import UserError


def blocks_of(path: Path, block_bytes: int) -> list[bytes]:
    with open(path, "rb") as raw:
        return list(read_blocks(path, HashingReader(raw), block_bytes))


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=30),
    block_bytes=st.integers(1, 100),
    final_newline=st.booleans(),
)
def test_blocks_are_whole_lines_and_nothing_is_lost(
    lines, block_bytes, final_newline, tmp_path_factory
):
    content = b"\n".join(lines) + (b"\n" if final_newline else b"")
    path = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    path.write_bytes(content)
    blocks = blocks_of(path, block_bytes)
    assert b"".join(blocks) == content
    assert all(block.endswith(b"\n") for block in blocks[:-1])


def compress(content: bytes, ending: str) -> bytes:
    if ending == "gz":
        half = len(content) // 2
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if ending == "zst":
        half = len(content) // 2
        compressor = zstandard.ZstdCompressor()
        return compressor.compress(content[:half]) + compressor.compress(content[half:])
    return content


@pytest.mark.parametrize("ending", ["", "gz", "zst"])
def test_compressed_files_of_several_members_read_the_same(ending, corpus, tmp_path):
    content = (corpus / "train.jsonl").read_bytes()
    path = tmp_path / ("c.jsonl" + (f".{ending}" if ending else ""))
    path.write_bytes(compress(content, ending))
    with open(path, "rb") as raw:
        reader = HashingReader(raw)
        blocks = list(read_blocks(path, reader, 1 << 18))
    assert b"".join(blocks) == content
    assert len(blocks) > 2
    assert reader.bytes_read == path.stat().st_size
    assert reader.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_damaged_compressed_files_are_named(ending, damage, corpus, tmp_path):
    path = tmp_path / f"c.jsonl.{ending}"
    content = compress((corpus / "train.jsonl").read_bytes(), ending)
    path.write_bytes(content[:-100] if damage == "cut" else b"this is not compressed at all")
    with pytest.raises(UserError, match=rf"c\.jsonl\.{ending} is damaged or cut short"):
        blocks_of(path, 1 << 20)


def test_every_defect_is_found_at_its_line():
    lines = [
        b'\xef\xbb\xbf{"text": "after a byte order mark"}',
        b'{"text": "unfinished',
        b'["text"]',
        b'{"content": "x"}',
        b'{"text": 3}',
        b'{"text": null}',
        b'{"text": "\\ud800"}',
        b'{"text": ""}',
        b"",
        b"  \r",
        b'{"text": "caf\xe9"}',
        b"[" * 100_000,
        b'{"text": "\\u00e9\\n"}\r',
    ]
    parsed = parse_block(b"\n".join(lines), "text")
    assert parsed.texts == [b"after a byte order mark", "é\n".encode()]
    assert parsed.text_lines == [1, 13]
    assert (parsed.lines, parsed.blank_lines) == (13, 2)
    assert [(issue.line, issue.defect) for issue in parsed.issues] == [
        (2, Defect.MALFORMED),
        (3, Defect.NOT_OBJECT),
        (4, Defect.MISSING_KEY),
        (5, Defect.NOT_STRING),
        (6, Defect.NOT_STRING),
        (7, Defect.NOT_UNICODE),
        (8, Defect.EMPTY),
        (11, Defect.MALFORMED),
        (12, Defect.MALFORMED),
    ]


def test_texts_of_several_files_come_in_order(write_jsonl):
    first = write_jsonl({"text": "a"}, "{", {"text": "b"}, name="1.jsonl")
    second = write_jsonl({"text": "c"}, name="2.jsonl")
    assert list(read_texts([first, second], "text")) == ["a", "b", "c"]


def test_globs_expand_in_order_and_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.jsonl"), str(tmp_path / "**/*.gz")]
    names = [path.relative_to(tmp_path).as_posix() for path in expand_inputs(patterns)]
    assert names == ["b.jsonl", "a.jsonl", "sub/c.jsonl.gz"]


def test_inputs_that_do_not_exist_or_are_something_else_are_named(tmp_path):
    with pytest.raises(UserError, match="no file matches the input /nowhere"):
        expand_inputs(["/nowhere/*.jsonl"])
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"a\.parquet is not among"):
        expand_inputs([str(tmp_path / "*")])


def test_the_hash_is_of_what_was_read():
    reader = HashingReader(io.BytesIO(b"abc"))
    assert reader.read(2) + reader.read() == b"abc"
    assert reader.hexdigest() == hashlib.sha256(b"abc").hexdigest()
    assert json.loads(json.dumps(Defect.EMPTY)) == "empty document"
