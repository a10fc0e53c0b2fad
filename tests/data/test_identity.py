"""A changed dataset is noticed on resuming, a changed blend is said, a moved one is the same."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from samba_megatron.config.data import DataConfig
from samba_megatron.data.identity import blend_changes, dataset_identity, identity_differences
from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.platform.errors import UserError


def write(prefix: Path, values: list[int]) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.array(values))
        writer.finish()
    return str(prefix)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    a, b = write(tmp_path / "a", [1, 2, 3]), write(tmp_path / "b", [4, 5, 6, 7, 8])
    cache = str(tmp_path / "cache")
    return DataConfig(["0.5", a, "0.5", b], sequence_length=2, path_to_cache=cache)


def test_an_identity_equals_itself_and_a_moved_copy(data, tmp_path):
    before = dataset_identity(data, 1)
    (tmp_path / "moved").mkdir()
    moved = []
    for name in "ab":
        for ending in ("bin", "idx"):
            shutil.copy(tmp_path / f"{name}.{ending}", tmp_path / f"moved/{name}.{ending}")
        moved += ["0.5", str(tmp_path / "moved" / name)]
    for other in (data, replace(data, data_path=moved)):
        assert identity_differences(before, dataset_identity(other, 1)) == []
        assert blend_changes(before, dataset_identity(other, 1)) == []


def test_what_must_not_change_is_named(data, tmp_path):
    before = dataset_identity(data, 1)

    def differences(seed: int = 1, **changes) -> str:
        now = dataset_identity(replace(data, **changes), seed)
        return "; ".join(identity_differences(before, now))

    assert differences(seed=2) == "random_seed was 1, now 2"
    assert differences(sequence_length=1) == "sequence_length was 2, now 1"
    other = write(tmp_path / "other", [9, 9, 9])
    assert "none of its datasets is in the blend" in differences(data_path=[other])
    assert differences(data_path=["1", data.data_path[1]]) == ""


def test_new_content_under_an_old_name_is_noticed(data, tmp_path):
    before = dataset_identity(data, 1)
    write(tmp_path / "a", [1, 2, 4])
    (found,) = identity_differences(before, dataset_identity(data, 1))
    assert found.startswith(f"fingerprint of the dataset {tmp_path / 'a'} was")
    write(tmp_path / "a", [1, 2, 4, 5])
    (found,) = identity_differences(before, dataset_identity(data, 1))
    assert found == f"tokens of the dataset {tmp_path / 'a'} was 3, now 4"


def test_a_changed_blend_is_said(data, tmp_path):
    before = dataset_identity(data, 1)
    a, b = data.data_path[1::2]
    other = write(tmp_path / "other", [9, 9, 9])
    changed = replace(data, data_path=["3", a, "1", other], valid_data_path=[b])
    assert blend_changes(before, dataset_identity(changed, 1)) == [
        f"these sources have joined the blend: {other}",
        f"these sources have left the blend: {b}",
        f"shares of the blend have changed: {a} from 0.5 to 0.75",
        "the held-out data have changed",
    ]
    file = tmp_path / "P.yaml"
    sources = [{"prefix": a, "weight": 1, "max_epochs": 2}, {"prefix": b, "weight": 1}]
    file.write_text(yaml.safe_dump({"sources": sources, "stages": [{"until_tokens": 9}]}))
    staged = replace(data, data_path=[], blend_file=[str(file)])
    assert blend_changes(before, dataset_identity(staged, 1)) == [
        f"max_epochs has changed: {a} from None to 2.0",
        "the stages of the blend have changed",
    ]


def test_a_file_that_says_otherwise_and_the_same_data_twice_are_refused(data, tmp_path):
    file = tmp_path / "P.yaml"
    for key, message in (
        ("tokens", "has 7 tokens, and .* has 3"),
        ("documents", "has 7 documents"),
    ):
        file.write_text(yaml.safe_dump({"sources": [{"name": "x", "prefix": "a", key: 7}]}))
        with pytest.raises(UserError, match=f"P.yaml says that x {message}"):
            dataset_identity(replace(data, data_path=[], blend_file=[str(file)]), 1)
    copy = write(tmp_path / "copy", [1, 2, 3])
    with pytest.raises(UserError, match="hold the same data: name one of them"):
        dataset_identity(replace(data, data_path=[*data.data_path, "1", copy]), 1)


def test_what_is_known_is_remembered_until_the_files_change(data, tmp_path):
    before = dataset_identity(data, 1)
    written = (tmp_path / "cache" / "catalogue.json").stat().st_mtime_ns
    assert dataset_identity(data, 1) == before
    assert (tmp_path / "cache" / "catalogue.json").stat().st_mtime_ns == written
    (tmp_path / "cache" / "catalogue.json").write_text("{broken")
    assert dataset_identity(data, 1) == before
    Path(f"{data.data_path[1]}.bin").write_bytes(b"\1\0")
    with pytest.raises(UserError, match="truncated or of another run"):
        dataset_identity(data, 1)
