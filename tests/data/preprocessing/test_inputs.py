"""Inputs of every kind and place are found once and in order, and others are named."""

import zipfile

import fsspec
import pytest

from samba_megatron.data.preprocessing.inputs import Kind, find_inputs, kind_of, open_input
from samba_megatron.platform.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Some files, two levels deep, one of them of no kind that is read."""
    for name in ("b.jsonl", "a.jsonl.zst", "sub/c.parquet", "sub/d.txt.gz", "sub/notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(name.encode())
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "e.jsonl").touch()
    return tmp_path


def names(files, folder) -> list[str]:
    return [file.path.removeprefix(f"{folder}/") for file in files]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a/b.jsonl", Kind.JSONL),
        ("b.json.gz", Kind.JSONL),
        ("c.txt.zst", Kind.TEXT),
        ("s3://bucket/d.parquet", Kind.PARQUET),
        ("zip://inner.jsonl::file:///a.zip", Kind.JSONL),
        ("e.parquet.gz", None),
        ("f.zip", None),
        ("parquet", None),
    ],
)
def test_the_ending_of_its_name_says_what_a_file_holds(name, kind):
    assert kind_of(name) is kind


def test_folders_give_all_that_is_read_in_order_and_name_the_rest(folder):
    files, others = find_inputs([str(folder)])
    assert names(files, folder) == ["a.jsonl.zst", "b.jsonl", "sub/c.parquet", "sub/d.txt.gz"]
    assert names(files[:1], folder)[0] == "a.jsonl.zst"
    assert [name.rsplit("/", 1)[1] for name in others] == ["notes.md"]
    assert files[1].size == len("b.jsonl")


def test_each_file_is_taken_once_where_it_is_named_first(folder):
    patterns = [f"{folder}/b.jsonl", f"{folder}/*.jsonl*", str(folder)]
    files, _ = find_inputs(patterns)
    assert names(files, folder)[:2] == ["b.jsonl", "a.jsonl.zst"]
    assert len(files) == 4


def test_urls_of_any_file_system_are_read(folder):
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/two.jsonl", b"2")
    memory.pipe("/corpus/one.jsonl", b"1")
    with zipfile.ZipFile(folder / "all.zip", "w") as archive:
        archive.writestr("in/three.jsonl", "3")
    patterns = [
        "memory://corpus/*.jsonl",
        f"file://{folder}/b.jsonl",
        f"zip://in/*.jsonl::file://{folder}/all.zip",
    ]
    files, _ = find_inputs(patterns)
    contents = []
    for file in files:
        with open_input(file.path) as stream:
            contents.append(stream.read())
    assert contents == [b"1", b"2", b"b.jsonl", b"3"]
    assert [file.size for file in files] == [len(content) for content in contents]
    assert names(find_inputs(["memory://corpus"])[0], "memory:/") == [
        "/corpus/one.jsonl",
        "/corpus/two.jsonl",
    ]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing*.jsonl", "no file matches the input"),
        ("sub/notes.md", "notes.md is not among .jsonl"),
        ("sub/*", "notes.md is not among"),
        (".hidden/..", None),
        ("memory://nowhere.jsonl", "no file matches the input memory://nowhere.jsonl"),
        ("nonsense://a.jsonl", "cannot read the input nonsense://a.jsonl"),
    ],
)
def test_what_cannot_be_read_is_named(folder, pattern, message):
    pattern = pattern if "://" in pattern else f"{folder}/{pattern}"
    if message is None:
        assert find_inputs([pattern])[0]
        return
    with pytest.raises(UserError, match=message):
        find_inputs([pattern])


def test_a_folder_without_data_is_named(tmp_path):
    (tmp_path / "readme.md").touch()
    with pytest.raises(UserError, match="holds no files of the kinds"):
        find_inputs([str(tmp_path)])


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    with pytest.raises(UserError, match=r"no file matches|cannot read"):
        find_inputs([str(tmp_path / "loop.jsonl")])
