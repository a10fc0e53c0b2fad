"""Gigatoken's tokens are Hugging Face's, and where they are not, Hugging Face's are used."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.data import encoding
from samba_megatron.data.encoding import (
    BlockTokenizer,
    Engine,
    SampleDocument,
    choose_engine,
    make_encoder,
)
from samba_megatron.data.jsonl import Defect, read_texts
from samba_megatron.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="module")
def engines(tokenizer):
    return make_encoder(tokenizer, Engine.GIGATOKEN), make_encoder(tokenizer, Engine.HUGGINGFACE)


def assert_equal(engines, texts: list[bytes]) -> None:
    (fast, fast_lengths), (slow, slow_lengths) = (encode(texts) for encode in engines)
    assert np.array_equal(fast_lengths, slow_lengths)
    assert np.array_equal(fast, slow)


def test_engines_agree_on_the_standard_library(engines, corpus):
    texts = [text.encode() for text in read_texts([corpus / "train.jsonl"], "text")]
    assert len(texts) > 100
    assert_equal(engines, texts)


@settings(deadline=None)
@given(texts=st.lists(st.text() | st.text("ab \n\t'1é<|endoftx>")))
def test_engines_agree_on_any_text(engines, texts):
    assert_equal(engines, [text.encode() for text in texts])


def test_special_tokens_in_a_text_become_their_ids_in_both(engines, tokenizer):
    text = b"before<|endoftext|>between <|endoftext|><|padding|> after <|endoftext"
    assert_equal(engines, [text])
    ids, _ = engines[0]([text])
    assert (ids == tokenizer.eod).sum() == 2


def test_gigatoken_is_chosen_where_it_agrees(tokenizer):
    assert choose_engine(tokenizer, [SampleDocument("x:1", b"text")]) == (Engine.GIGATOKEN, None)


def test_a_tokenizer_that_gigatoken_does_not_know_falls_back(tmp_path):
    model = tokenizers.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, "[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    engine, reason = choose_engine(tokenizer, [])
    assert engine is Engine.HUGGINGFACE
    assert reason is not None
    assert "gigatoken cannot run this tokenizer" in reason
    block = BlockTokenizer(tokenizer, engine, "text", append_eod=True)(b'{"text": "a a b"}\n')
    assert block.tokens.tolist() == [2, 2, 0, 1]


def off_by_one(encoder: encoding.Encoder, victim: bytes) -> encoding.Encoder:
    """An encoder that gets ``victim`` wrong."""

    def encode(texts):
        ids, lengths = encoder(texts)
        starts = np.cumsum(lengths) - lengths
        ids = ids.copy()
        for text, start in zip(texts, starts, strict=True):
            if text == victim:
                ids[start] += 1
        return ids, lengths

    return encode


@pytest.fixture
def broken_gigatoken(monkeypatch):
    """Gigatoken wrong on the text ``victim``."""
    monkeypatch.setattr(
        encoding,
        "_gigatoken_encoder",
        lambda tokenizer: off_by_one(encoding._huggingface_encoder(tokenizer), b"victim"),
    )


def test_a_difference_in_the_sample_falls_back_and_names_it(tokenizer, broken_gigatoken):
    sample = [SampleDocument("docs.jsonl:1", b"fine"), SampleDocument("docs.jsonl:7", b"victim")]
    engine, reason = choose_engine(tokenizer, sample)
    assert engine is Engine.HUGGINGFACE
    assert reason == "gigatoken gives other tokens for docs.jsonl:7"


def test_a_difference_found_later_is_reported_by_line(tokenizer, broken_gigatoken):
    tokenize = BlockTokenizer(tokenizer, Engine.GIGATOKEN, "text", append_eod=True)
    lines = [{"text": "fine"}, {"text": "victim"}, {"text": "x" * 20_000}]
    block = tokenize("\n".join(map(json.dumps, lines)).encode())
    assert block.disagreement == 2
    assert tokenize(b'{"text": "fine"}').disagreement is None


@pytest.mark.parametrize("engine", list(Engine))
def test_a_block_is_its_documents_each_with_an_end(tokenizer, engine):
    texts = ["one", "two words", "three\nlines\nhere"]
    block = "\n".join(json.dumps({"body": text}) for text in texts).encode()
    result = BlockTokenizer(tokenizer, engine, "body", append_eod=True)(block)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert result.lengths.tolist() == [len(row) for row in expected]
    assert result.tokens.tolist() == list(chain(*expected))
    assert result.tokens.dtype == np.uint16
    bare = BlockTokenizer(tokenizer, engine, "body", append_eod=False)(block)
    assert bare.tokens.tolist() == list(chain(*(row[:-1] for row in expected)))
    assert result.text_bytes == sum(map(len, texts))


@pytest.mark.parametrize("append_eod", [True, False])
def test_a_block_without_documents(tokenizer, append_eod):
    result = BlockTokenizer(tokenizer, Engine.GIGATOKEN, "text", append_eod)(b"{}\n\n")
    assert (len(result.tokens), len(result.lengths), result.lines) == (0, 0, 2)
    assert [issue.defect for issue in result.issues] == [Defect.MISSING_KEY]


def test_a_document_that_the_normalizer_empties_is_an_issue(tmp_path: Path):
    model = tokenizers.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, "[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Strip()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenize = BlockTokenizer(load_tokenizer(tmp_path), Engine.HUGGINGFACE, "text", False)
    result = tokenize(b'{"text": "a"}\n{"text": " "}\n{"text": "a"}\n')
    assert result.lengths.tolist() == [1, 1]
    assert [(issue.line, issue.defect) for issue in result.issues] == [(2, Defect.EMPTY)]
