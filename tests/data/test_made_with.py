"""Datasets that another tokenizer made are named before a run trains on them."""

import json
import shutil
from pathlib import Path

import pytest

from samba_megatron.config.data import DataConfig
from samba_megatron.data.indexed import check_dataset
from samba_megatron.data.inspection import inspect_dataset
from samba_megatron.data.made_with import other_tokenizers
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.tokenizer import train_tokenizer
from samba_megatron.platform.errors import UserError


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    train_tokenizer(["quite another text"], 260, folder, show_progress=False)
    return folder


def test_another_tokenizer_is_named_with_what_differs(dataset, held_out, tokenizer_folder, other):
    data = DataConfig(data_path=[dataset], valid_data_path=[held_out])
    assert other_tokenizers(data) == []
    data.tokenizer = str(tokenizer_folder)
    assert other_tokenizers(data) == []
    data.tokenizer = str(other)
    found = other_tokenizers(data)
    assert len(found) == 1, "once a tokenizer, however many datasets it made"
    assert found[0].startswith(f"{dataset} was made with another tokenizer than")
    assert "(vocabulary 2048, here 260; end of document 0, here 0)" in found[0]


def test_one_without_a_manifest_or_with_a_strange_one_is_passed_over(dataset, other, tmp_path):
    for ending in ("bin", "idx"):
        shutil.copy(f"{dataset}.{ending}", tmp_path / f"bare.{ending}")
    data = DataConfig(data_path=[str(tmp_path / "bare")], tokenizer=str(other))
    assert other_tokenizers(data) == []
    (tmp_path / "bare.manifest.json").write_text('{"format": 99}')
    assert other_tokenizers(data) == []


def test_of_many_shards_some_tell_and_the_prefix_of_all_leads_to_the_blend(
    corpus, tokenizer_folder, other, tmp_path
):
    prefix = str(tmp_path / "all")
    source = str(corpus / "train.jsonl")
    preprocess(PreprocessOptions([source], str(tokenizer_folder), prefix, shard_bytes=10**6))
    data = DataConfig(blend_file=[f"{prefix}.blend.yaml"], tokenizer=str(other))
    assert f"{prefix}_00000 was made with another" in other_tokenizers(data)[0]
    for open_it in (check_dataset, inspect_dataset):
        with pytest.raises(UserError, match=rf"give its blend file {prefix}\.blend\.yaml"):
            open_it(prefix)


def test_the_one_among_many_shards_is_found(dataset, tokenizer_folder, tmp_path):
    """Only manifests are read: the shards need not be there."""
    manifest = json.loads(Path(f"{dataset}.manifest.json").read_text())
    shards = [str(tmp_path / f"many_{number:05}") for number in range(100)]
    for prefix in shards:
        Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))
    manifest["tokenizer"]["identity"] = "0" * 64
    odd = str(tmp_path / "odd")
    Path(f"{odd}.manifest.json").write_text(json.dumps(manifest))
    data = DataConfig(data_path=[*shards, odd], tokenizer=str(tokenizer_folder))
    (found,) = other_tokenizers(data)
    assert found.startswith(f"{odd} was made with")
    manifest["tokenizer"] = None
    Path(f"{odd}.manifest.json").write_text(json.dumps(manifest))
    assert other_tokenizers(data) == []
