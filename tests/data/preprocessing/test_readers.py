"""Every format gives the same documents, in any cut, and every defect at its place."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from samba_megatron.data.jsonl import Defect, text_of
from samba_megatron.data.preprocessing.inputs import find_inputs
from samba_megatron.data.preprocessing.readers import PieceReader, place_name
from samba_megatron.data.preprocessing.shards import Piece, plan_shards
from samba_megatron.platform.errors import UserError


def whole(path: Path) -> Piece:
    (file,) = find_inputs([str(path)])[0]
    return Piece(file, 0, -1, file.size)


def texts_of(piece: Piece, key: str = "text", **options: object) -> list[bytes]:
    return [t for batch in PieceReader(piece, key, **options) for t in batch.texts]  # type: ignore[arg-type]


def pieces_of(path: Path, parts: int) -> list[Piece]:
    (file,) = find_inputs([str(path)])[0]
    bounds = [file.size * part // parts for part in range(parts + 1)]
    return [Piece(file, *pair, 0) for pair in pairwise(bounds)]


line = st.binary(max_size=40) | st.text(max_size=20).map(
    lambda text: json.dumps({"text": text}).encode()
)


@settings(max_examples=200)
@given(
    lines=st.lists(line, max_size=20),
    parts=st.integers(1, 12),
    final=st.booleans(),
)
def test_any_cut_gives_each_line_once(lines, parts, final, tmp_path_factory):
    content = b"\n".join(lines) + (b"\n" if final else b"")
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content)
    expected = list(PieceReader(whole(path), "text"))
    batches = [b for piece in pieces_of(path, parts) for b in PieceReader(piece, "text")]
    for name in ("lines", "blank_lines", "read_bytes"):
        assert sum(getattr(b, name) for b in batches) == sum(getattr(b, name) for b in expected)
    assert [t for b in batches for t in b.texts] == [t for b in expected for t in b.texts]
    found = [issue.defect for b in batches for issue in b.issues]
    assert found == [issue.defect for b in expected for issue in b.issues]


def python_reads(raw: bytes) -> bytes | None:
    """What Megatron-LM's script takes out of a line, as UTF-8; None if it would fail."""
    try:
        text = json.loads(raw)["text"]
        return text.encode() if isinstance(text, str) else None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError, UnicodeError):
        return None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=5,
)


@settings(max_examples=300)
@given(
    value=st.fixed_dictionaries({}, optional={"text": json_values | st.text(), "more": json_values})
    | json_values,
    ascii_only=st.booleans(),
    damage=st.none() | st.tuples(st.integers(0, 60), st.binary(min_size=1, max_size=3)),
)
def test_a_line_is_read_as_pythons_json_reads_it(value, ascii_only, damage, tmp_path_factory):
    """Damaged ones too: any bytes anywhere give the same text, or a named defect."""
    raw = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    if damage:
        raw = raw[: damage[0]] + damage[1] + raw[damage[0] :]
    raw = raw.replace(b"\n", b" ")
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(raw + b"\n")
    (batch,) = PieceReader(whole(path), "text")
    expected = python_reads(raw)
    assert batch.texts == ([expected] if expected else [])
    assert len(batch.texts) + len(batch.issues) + batch.blank_lines == 1


DOCUMENTS = ["one", "zwei é", "three\r\nlines\x00and\tNUL", "四", "x" * 70_000] * 7


def write_as(form: str, path: Path) -> Path:
    lines = "".join(json.dumps({"text": t, "id": str(i)}) + "\n" for i, t in enumerate(DOCUMENTS))
    if form == "jsonl":
        path.write_text(lines)
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif form == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines.encode()))
    else:
        kind = {
            "parquet": pyarrow.string(),
            "large.parquet": pyarrow.large_string(),
            "binary.parquet": pyarrow.binary(),
            "dictionary.parquet": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        }[form]
        texts = pyarrow.array(DOCUMENTS).cast(pyarrow.string())
        column = texts.dictionary_encode() if "dictionary" in form else texts.cast(kind)
        table = pyarrow.table({"id": [str(i) for i in range(len(DOCUMENTS))], "text": column})
        parquet.write_table(table, path, row_group_size=9)
    return path


FORMS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.zst",
    "parquet",
    "large.parquet",
    "binary.parquet",
    "dictionary.parquet",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_documents(form, tmp_path):
    piece = whole(write_as(form, tmp_path / f"documents.{form}"))
    expected = [text.encode() for text in DOCUMENTS]
    assert texts_of(piece) == expected
    reader = PieceReader(piece, "text", with_metadata=True)
    metadata = [m for batch in reader for m in batch.metadata or []]
    assert [m["id"] for m in metadata] == [str(i) for i in range(len(DOCUMENTS))]
    assert reader.lines == len(DOCUMENTS)
    assert len(reader.sha256) == 64
    again = PieceReader(piece, "text")
    assert [t for batch in again for t in batch.texts] == expected
    assert again.sha256 == reader.sha256


def test_text_files_are_one_document_each(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "c.txt").write_text("")
    (shard,) = plan_shards(find_inputs([str(tmp_path)])[0])
    batches = [b for piece in shard.pieces for b in PieceReader(piece, "text")]
    assert [b.texts for b in batches] == [[b"one\n\ntwo\n"], [b"three"], []]
    assert [i.defect for i in batches[2].issues] == [Defect.EMPTY]
    assert place_name(shard.pieces[0], 1) == str(tmp_path / "a.txt")


def test_parquet_is_cut_between_row_groups(tmp_path):
    path = write_as("parquet", tmp_path / "documents.parquet")
    shards = plan_shards(find_inputs([str(path)])[0], path.stat().st_size)
    assert len(shards) > 2
    texts = [text for shard in shards for text in texts_of(shard.pieces[0])]
    assert texts == [text.encode() for text in DOCUMENTS]
    assert place_name(shards[1].pieces[0], 1).endswith("documents.parquet:row 10")


def test_unusable_rows_and_files_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "", "b"], "n": [1, 2, 3, 4]}), path)
    (batch,) = PieceReader(whole(path), "text")
    assert batch.texts == [b"a", b"b"]
    assert [(i.line, i.defect) for i in batch.issues] == [(2, Defect.NOT_STRING), (3, Defect.EMPTY)]
    with pytest.raises(UserError, match=r"no column 'body' \(text, n\): name one with --text-key"):
        texts_of(whole(path), "body")
    assert [i.defect for b in PieceReader(whole(path), "n") for i in b.issues] == (
        [Defect.NOT_STRING] * 4
    )
    raw = pyarrow.table({"text": pyarrow.array([b"caf\xe9", b"fine"])})
    parquet.write_table(raw, path)
    (batch,) = PieceReader(whole(path), "text")
    assert (batch.texts, batch.issues[0].defect) == ([b"fine"], Defect.NOT_UNICODE)


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "parquet"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_files_cut_short_are_named(form, keep, tmp_path):
    path = write_as(form, tmp_path / f"documents.{form}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=rf"documents\.{form} is damaged or cut short"):
        texts_of(whole(path))


def test_a_file_that_changed_after_planning_is_named(tmp_path):
    path = write_as("jsonl", tmp_path / "documents.jsonl")
    piece = whole(path)
    path.write_text('{"text": "other"}\n')
    with pytest.raises(UserError, match="changed since the work was planned"):
        texts_of(piece)


def test_places_in_a_piece_count_from_the_files_start(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(1, 101)))
    for piece in pieces_of(path, 7):
        reader = PieceReader(piece, "text")
        for batch in reader:
            for text, place in zip(batch.texts, batch.places, strict=True):
                name = place_name(piece, reader.lines + place)
                assert name == f"{path}:{text.decode()}"


def test_a_key_that_holds_no_text_is_a_defect():
    assert text_of({"text": "\ud800"}, "text") is Defect.NOT_UNICODE
    assert text_of({}, "text") is Defect.MISSING_KEY
