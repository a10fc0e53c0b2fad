"""A trained tokenizer loses nothing, loads in Hugging Face, and bad ones are named."""

import base64
import inspect
import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.checkpoint.huggingface.companions import TokenizerFiles
from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.preprocessing.encoding import Engine, choose_engine
from samba_megatron.data.tokenizer import (
    END_OF_DOCUMENT,
    SPECIAL_TOKENS,
    load_tokenizer,
    train_tokenizer,
)
from samba_megatron.platform.errors import UserError


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


@pytest.fixture(scope="module")
def sentencepiece_model(corpus, tmp_path_factory) -> Path:
    """A model of Llama's kind: BPE that falls back to bytes, digits apart, no normalising."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=islice(read_texts([corpus / "train.jsonl"], "text"), 60),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=1200,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=20_000,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def test_a_sentencepiece_model_gives_its_own_tokens(sentencepiece_model, corpus):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    for source in (sentencepiece_model, sentencepiece_model.parent):
        loaded = load_tokenizer(source)
        assert (loaded.eod, loaded.vocab_size) == (theirs.eos_id(), theirs.vocab_size())
    for text in islice(read_texts([corpus / "validation.jsonl"], "text"), 20):
        assert loaded.encode(text) == theirs.encode(text)
        assert loaded.decode(loaded.encode(text)) == theirs.decode(theirs.encode(text))
    assert loaded.decode(loaded.encode("48213 é")) == "48213 é"
    assert choose_engine(loaded, []) == (Engine.GIGATOKEN, None)


def test_any_kind_of_file_becomes_a_folder_of_an_export(
    sentencepiece_model, tiktoken_file, tokenizer_folder, corpus, tmp_path
):
    from transformers import AutoTokenizer

    texts = list(islice(read_texts([corpus / "validation.jsonl"], "text"), 20))
    for number, source in enumerate((sentencepiece_model, tiktoken_file, tokenizer_folder)):
        original, folder = load_tokenizer(source), tmp_path / str(number)
        folder.mkdir()
        TokenizerFiles(original, {}).copy_to(folder)
        theirs, again = AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
        assert theirs.eos_token_id == again.eod == original.eod
        for text in texts:
            ids = original.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == again.encode(text) == ids
            assert theirs.decode(ids) == again.decode(ids) == text


@pytest.fixture(scope="module")
def tiktoken_file(tokenizer, tmp_path_factory) -> Path:
    """The trained vocabulary as a rank file, under a published encoding's name."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    ranks = sorted(set(vocabulary) - set(SPECIAL_TOKENS), key=vocabulary.__getitem__)
    path = tmp_path_factory.mktemp("tiktoken") / "cl100k_base.tiktoken"
    with path.open("w") as stream:
        for rank, token in enumerate(ranks):
            raw = bytes(of_character[character] for character in token)
            stream.write(f"{base64.b64encode(raw).decode()} {rank}\n")
    return path


def test_a_tiktoken_file_gives_its_own_tokens(tiktoken_file, corpus):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe
    from tiktoken_ext import openai_public

    published = inspect.getsource(openai_public.cl100k_base)
    pattern = next(line for line in published.splitlines() if "pat_str" in line).split('"""')[1]
    special = {END_OF_DOCUMENT: 100257}
    theirs = tiktoken.Encoding(
        "test",
        pat_str=pattern,
        mergeable_ranks=load_tiktoken_bpe(str(tiktoken_file)),
        special_tokens=special,
    )
    loaded = load_tokenizer(tiktoken_file)
    assert (loaded.eod, loaded.vocab_size) == (100257, 100277)
    hard = ["don't DON'T   x\n\n \r\n\t12345 日本語 é ", f"a{END_OF_DOCUMENT}b", "  \n  "]
    for text in [*hard, *islice(read_texts([corpus / "validation.jsonl"], "text"), 20)]:
        assert loaded.encode(text) == theirs.encode(text, allowed_special="all")
        assert loaded.decode(loaded.encode(text)) == text


def test_files_that_say_too_little_are_named(tiktoken_file, tmp_path):
    unknown = tmp_path / "mine.tiktoken"
    unknown.write_bytes(tiktoken_file.read_bytes())
    with pytest.raises(UserError, match="call it one of r50k_base.tiktoken"):
        load_tokenizer(unknown)
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"broken\.model is not a SentencePiece model"):
        load_tokenizer(broken)


def test_a_name_is_looked_up_in_hugging_faces_cache(tokenizer_folder, tmp_path):
    """As it lies in the cache after a download; nothing is fetched."""
    snapshot = tmp_path / "models--some--tokenizer" / "snapshots" / "0123"
    shutil.copytree(tokenizer_folder, snapshot)
    (tmp_path / "models--some--tokenizer" / "refs").mkdir()
    (tmp_path / "models--some--tokenizer" / "refs" / "main").write_text("0123")
    program = (
        "import sys; from samba_megatron.data.tokenizer import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).identity)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name, code in (("some/tokenizer", 0), ("other/tokenizer", 1)):
        command = [sys.executable, "-c", program, name]
        found = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert found.returncode == code
        expected = load_tokenizer(tokenizer_folder).identity
        assert expected in found.stdout if code == 0 else "neither the cache" in found.stderr


def test_every_digit_can_be_a_token_of_its_own(tmp_path):
    texts = [f"the year {year} and {year * 7}" for year in range(1900, 2000)]
    plain = train_tokenizer(texts, 300, tmp_path / "plain", False)
    split = train_tokenizer(texts, 300, tmp_path / "split", False, split_digits=True)
    assert len(plain.encode(" 1987")) < 4
    for text in ("1987", " 1987 and 12", "x12345.6"):
        tokens = [split.decode([token]) for token in split.encode(text)]
        assert all(token.isdigit() <= (len(token) == 1) for token in tokens)
        assert [token for token in tokens if token.isdigit()] == [c for c in text if c.isdigit()]
        assert split.decode(split.encode(text)) == text
