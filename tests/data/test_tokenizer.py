"""A trained tokenizer loses nothing, loads in Hugging Face, and bad ones are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from samba_megatron.platform.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@given(text=st.text())
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_is_as_large_as_asked_and_ends_documents(tokenizer):
    assert tokenizer.vocab_size == 2048
    assert tokenizer.decode([tokenizer.eod]) == END_OF_DOCUMENT
    assert tokenizer.encode(f"a{END_OF_DOCUMENT}").count(tokenizer.eod) == 1
    assert tokenizer.eod not in tokenizer.encode("plain text")


def test_hugging_face_loads_the_folder(tokenizer, tokenizer_folder):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    text = f"def f(x):\n    return 'é'{END_OF_DOCUMENT}"
    assert loaded(text)["input_ids"] == tokenizer.encode(text)
    assert loaded.decode(tokenizer.encode(text)) == text
    assert (loaded.eos_token_id, len(loaded)) == (tokenizer.eod, tokenizer.vocab_size)
    assert loaded.pad_token_id not in (None, loaded.eos_token_id)


def test_training_again_gives_the_same_tokenizer(corpus, tokenizer, tmp_path):
    texts = read_texts([corpus / "train.jsonl"], "text")
    again = train_tokenizer(texts, 2048, tmp_path, show_progress=False)
    assert again.identity == tokenizer.identity


def test_loading_needs_neither_torch_nor_transformers():
    code = (
        "import sys, samba_megatron.data.tokenizer;"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size 257 is too small"):
        train_tokenizer(["text"], 257, tmp_path)


def test_training_on_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer([], 300, tmp_path, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*/nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


def configured(tokenizer_folder: Path, folder: Path, config: object) -> Path:
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("eos", ["<|padding|>", {"content": "<|padding|>", "lstrip": False}])
def test_the_configuration_names_the_end_of_document(tokenizer_folder, tmp_path, eos):
    loaded = load_tokenizer(configured(tokenizer_folder, tmp_path, {"eos_token": eos}))
    assert loaded.eod == loaded.backend.token_to_id("<|padding|>")


def test_an_end_of_document_that_is_no_token_is_named(tokenizer_folder, tmp_path):
    folder = configured(tokenizer_folder, tmp_path, {"eos_token": "</s>"})
    with pytest.raises(UserError, match="has no token '</s>' to end documents"):
        load_tokenizer(folder)


def test_a_damaged_configuration_is_named(tokenizer_folder, tmp_path):
    folder = configured(tokenizer_folder, tmp_path, ["not", "an", "object"])
    with pytest.raises(UserError, match=r"cannot read .*tokenizer_config\.json"):
        load_tokenizer(folder)
