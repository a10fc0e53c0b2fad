"""The corpus is real, split by path, and the same wherever it is gathered."""

import json
from pathlib import Path

import pytest

from samba_megatron.data.corpus import gather_corpus, is_held_out
from samba_megatron.platform.errors import UserError


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = tmp_path / "library"
    for number in range(200):
        path = root / f"package{number % 7}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# module {number}, with an é\n" * (1 + number % 5), encoding="utf-8")
    (root / "empty.py").write_text("\n")
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    (root / "notes.txt").write_text("not a source")
    (root / "site-packages").mkdir()
    (root / "site-packages" / "other.py").write_text("# someone else's")
    return root


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_source_is_in_one_split(sources, tmp_path):
    report = gather_corpus(tmp_path / "out", source=sources)
    train, validation = read(tmp_path / "out/train.jsonl"), read(tmp_path / "out/validation.jsonl")
    assert len(train) + len(validation) == 200
    assert (report.train.documents, report.validation.documents) == (len(train), len(validation))
    assert (report.undecodable, report.empty, report.over_budget) == (1, 1, 0)
    assert all(is_held_out(document["path"]) for document in validation)
    assert not any(is_held_out(document["path"]) for document in train)
    for document in train + validation:
        assert (sources / document["path"]).read_text(encoding="utf-8") == document["text"]
    assert [d["path"] for d in train] == sorted(d["path"] for d in train)


def test_gathering_again_gives_the_same_bytes(sources, tmp_path):
    for name in ("a", "b"):
        gather_corpus(tmp_path / name, source=sources)
    for split in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / split).read_bytes() == (tmp_path / "b" / split).read_bytes()


def test_a_new_file_moves_no_other_between_the_splits(sources, tmp_path):
    gather_corpus(tmp_path / "before", source=sources)
    (sources / "aaa.py").write_text("# first of all\n")
    gather_corpus(tmp_path / "after", source=sources)
    before = {d["path"] for d in read(tmp_path / "before/validation.jsonl")}
    after = {d["path"] for d in read(tmp_path / "after/validation.jsonl")}
    assert after - {"aaa.py"} == before


def test_a_budget_is_kept_and_spread(sources, tmp_path):
    report = gather_corpus(tmp_path / "out", max_megabytes=0.005, source=sources)
    text_bytes = report.train.text_bytes + report.validation.text_bytes
    assert 3_000 < text_bytes <= 5_000
    assert report.over_budget > 0
    packages = {d["path"].split("/")[0] for d in read(tmp_path / "out/train.jsonl")}
    assert len(packages) > 3


def test_about_two_percent_of_the_standard_library_is_held_out(tmp_path):
    report = gather_corpus(tmp_path)
    share = report.validation.documents / (report.train.documents + report.validation.documents)
    assert 0.01 < share < 0.04
    assert report.train.text_bytes > 5e6


def test_a_folder_without_sources_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.py files"):
        gather_corpus(tmp_path / "out", source=tmp_path)


def test_a_budget_without_room_is_a_user_error(sources, tmp_path):
    with pytest.raises(UserError, match="no room for a single file"):
        gather_corpus(tmp_path / "out", max_megabytes=1e-6, source=sources)


def test_an_unwritable_output_is_a_user_error(sources, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the corpus"):
        gather_corpus(tmp_path / "file", source=sources)
