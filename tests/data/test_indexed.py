"""The writer makes Megatron's bytes, and nothing unusable passes the check."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from samba_megatron.data import indexed
from samba_megatron.data.indexed import (
    IndexedWriter,
    check_dataset,
    fingerprint,
    read_index,
    sequence_lengths,
    token_dtype,
)
from samba_megatron.platform.errors import UserError

documents_strategy = st.lists(
    hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 60_000)), min_size=1
)


def write(prefix: Path, documents: list[np.ndarray], dtype: np.dtype) -> indexed.IndexInfo:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
        return writer.finish()


def write_with_megatron(prefix: Path, documents: list[np.ndarray], dtype: np.dtype) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 300_000])
def test_token_dtype_is_megatrons(vocab_size):
    assert token_dtype(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@settings(max_examples=30)
@given(documents=documents_strategy, vocab_size=st.sampled_from([60_001, 100_000]))
def test_bytes_equal_megatrons_and_read_back(documents, vocab_size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    dtype = token_dtype(vocab_size)
    write(folder / "ours", documents, dtype)
    write_with_megatron(folder / "theirs", documents, dtype)
    for ending in ("bin", "idx"):
        assert (folder / f"ours.{ending}").read_bytes() == (
            folder / f"theirs.{ending}"
        ).read_bytes()
    loaded = IndexedDataset(str(folder / "ours"))
    assert all(
        np.array_equal(row, document) for row, document in zip(loaded, documents, strict=True)
    )


def test_index_written_in_chunks_equals_megatrons(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_CHUNK", 7)
    documents = [np.arange(length) for length in range(1, 50)]
    write(tmp_path / "ours", documents, np.dtype(np.int32))
    write_with_megatron(tmp_path / "theirs", documents, np.dtype(np.int32))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_adding_many_documents_at_once_is_adding_one_by_one(tmp_path):
    documents = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])]
    write(tmp_path / "one", documents, np.dtype(np.uint16))
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        writer.add(np.concatenate(documents[:2]), np.array([2, 1]))
        writer.add(documents[2], np.array([3]))
        info = writer.finish()
    assert (info.documents, info.tokens, writer.max_token_id) == (3, 6, 6)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"one.{ending}").read_bytes() == (
            tmp_path / f"many.{ending}"
        ).read_bytes()
    assert sequence_lengths(tmp_path / "many").tolist() == [2, 1, 3]


def test_read_index_describes_the_dataset(tmp_path):
    write(tmp_path / "d", [np.arange(5), np.arange(3)], np.dtype(np.uint16))
    info = read_index(tmp_path / "d")
    assert (info.documents, info.sequences, info.tokens) == (2, 2, 8)
    assert info.dtype == np.uint16
    assert check_dataset(tmp_path / "d", vocab_size=5) == info


def test_leaving_the_block_early_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.arange(5))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_finished_dataset_stands_alone(tmp_path):
    write(tmp_path / "d", [np.arange(5)], np.dtype(np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_what_a_killed_run_left_behind_is_no_harm(tmp_path):
    for name in (".d.bin.partial", ".d.idx.partial", ".d.lengths.partial"):
        (tmp_path / name).write_text("half-written")
    write(tmp_path / "d", [np.arange(5)], np.dtype(np.uint16))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    assert read_index(tmp_path / "d").tokens == 5


def test_ids_that_do_not_fit_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        with pytest.raises(ValueError, match="65536 do not fit uint16"):
            writer.add_document(np.array([1, 65_536]))
        with pytest.raises(ValueError, match="-1..3 do not fit"):
            writer.add_document(np.array([-1, 3]))
        with pytest.raises(ValueError, match="lengths sum to 3"):
            writer.add(np.array([1, 2]), np.array([3]))


def test_two_writers_of_one_prefix_exclude_each_other(tmp_path):
    with IndexedWriter(tmp_path / "d", np.uint16):
        with pytest.raises(UserError, match="another process is writing"):
            IndexedWriter(tmp_path / "d", np.uint16)
    IndexedWriter(tmp_path / "d", np.uint16).discard()


def test_an_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        IndexedWriter(tmp_path / "file" / "d", np.uint16)


def damage_missing_bin(prefix: Path) -> None:
    Path(f"{prefix}.bin").unlink()


def damage_missing_idx(prefix: Path) -> None:
    Path(f"{prefix}.idx").unlink()


def damage_truncated_bin(prefix: Path) -> None:
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(7)


def damage_truncated_idx(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.truncate(40)


def damage_short_header(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.truncate(20)


def damage_foreign_idx(prefix: Path) -> None:
    Path(f"{prefix}.idx").write_text("hello, this is no index of any kind, but it is long enough")


def damage_version(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(9)
        stream.write(b"\x02")


def damage_last_mark(prefix: Path) -> None:
    with open(f"{prefix}.idx", "r+b") as stream:
        stream.seek(-8, 2)
        stream.write(b"\x09")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing_bin, "cannot read .*d.bin"),
        (damage_missing_idx, "cannot read .*d.idx"),
        (damage_truncated_bin, "d.bin has 7 bytes but its index describes 16"),
        (damage_truncated_idx, "d.idx is truncated"),
        (damage_short_header, "d.idx is not a Megatron index"),
        (damage_foreign_idx, "d.idx is not a Megatron index"),
        (damage_version, "version 2"),
        (damage_last_mark, "d.idx is damaged"),
    ],
)
def test_a_damaged_dataset_is_named(tmp_path, damage, message):
    write(tmp_path / "d", [np.arange(5), np.arange(3)], np.dtype(np.uint16))
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=message):
        check_dataset(tmp_path / "d")


def test_an_empty_dataset_is_refused(tmp_path):
    write(tmp_path / "d", [], np.dtype(np.uint16))
    with pytest.raises(UserError, match="is empty"):
        check_dataset(tmp_path / "d")


def test_ids_outside_the_models_vocabulary_are_refused(tmp_path):
    write(tmp_path / "d", [np.arange(5)], np.dtype(np.uint16))
    with pytest.raises(UserError, match="token id 4, outside the model's vocabulary of 4"):
        check_dataset(tmp_path / "d", vocab_size=4)


def test_a_file_name_in_place_of_the_prefix_is_explained(tmp_path):
    write(tmp_path / "d", [np.arange(5)], np.dtype(np.uint16))
    with pytest.raises(UserError, match=r"give its prefix, .*/d$"):
        check_dataset(tmp_path / "d.bin")


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    write(tmp_path / "a", [np.arange(5)], np.dtype(np.uint16))
    write(tmp_path / "b", [np.arange(5)], np.dtype(np.uint16))
    write(tmp_path / "c", [np.arange(5)[::-1]], np.dtype(np.uint16))
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")
