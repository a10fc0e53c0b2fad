"""Gigatoken's tokens are Hugging Face's, and where they are not, Hugging Face's are used."""

import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.preprocessing import encoding
from samba_megatron.data.preprocessing.encoding import (
    BatchTokenizer,
    Engine,
    SampleDocument,
    choose_engine,
    make_encoder,
)
from samba_megatron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[3]


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
    found = BatchTokenizer(tokenizer, engine, append_eod=True)([b"a a b"])
    assert found.tokens.tolist() == [2, 2, 0, 1]


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
        lambda tokenizer, threads: off_by_one(encoding._huggingface_encoder(tokenizer), b"victim"),
    )


def test_a_difference_in_the_sample_falls_back_and_names_it(tokenizer, broken_gigatoken):
    sample = [SampleDocument("docs.jsonl:1", b"fine"), SampleDocument("docs.jsonl:7", b"victim")]
    engine, reason = choose_engine(tokenizer, sample)
    assert engine is Engine.HUGGINGFACE
    assert reason == "gigatoken gives other tokens for docs.jsonl:7"


def test_a_difference_is_found_later(tokenizer, broken_gigatoken):
    texts = [b"fine", b"victim", b"x" * 20_000]
    spot_checked = BatchTokenizer(tokenizer, Engine.GIGATOKEN, append_eod=True)
    assert spot_checked(texts).disagreement == 1
    assert spot_checked(texts).disagreement is None  # the next check is tens of megabytes away
    verified = BatchTokenizer(tokenizer, Engine.GIGATOKEN, append_eod=True, verify=True)
    assert [verified(texts).disagreement, verified([b"victim"] * 2).disagreement] == [1, 0]
    assert verified([b"fine"]).disagreement is None


@pytest.mark.parametrize("engine", list(Engine))
@pytest.mark.parametrize("texts", [["one", "two words", "three\nlines\nhere"], ["x y " * 900] * 3])
def test_documents_end_with_the_eod(tokenizer, engine, texts):
    encoded = [text.encode() for text in texts]
    result = BatchTokenizer(tokenizer, engine, append_eod=True)(encoded)
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert result.lengths.tolist() == [len(row) for row in expected]
    assert result.tokens.tolist() == list(chain(*expected))
    assert result.tokens.dtype == np.uint16
    bare = BatchTokenizer(tokenizer, engine, append_eod=False)(encoded)
    assert bare.tokens.tolist() == list(chain(*(row[:-1] for row in expected)))


@pytest.mark.parametrize("append_eod", [True, False])
def test_no_texts_are_no_tokens(tokenizer, append_eod):
    result = BatchTokenizer(tokenizer, Engine.GIGATOKEN, append_eod)([])
    assert (len(result.tokens), len(result.lengths), result.emptied) == (0, 0, [])


@pytest.mark.parametrize("append_eod", [True, False])
def test_a_text_that_the_normalizer_empties_is_no_document(tmp_path: Path, append_eod):
    model = tokenizers.models.WordLevel({"[UNK]": 0, "<|endoftext|>": 1, "a": 2}, "[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Strip()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenize = BatchTokenizer(load_tokenizer(tmp_path), Engine.HUGGINGFACE, append_eod)
    result = tokenize([b"a", b" ", b"a"])
    assert result.tokens.tolist() == ([2, 1, 2, 1] if append_eod else [2, 2])
    assert result.emptied == [1]


RANDOM_WORDS = """
import sys
from pathlib import Path
import numpy as np
from samba_megatron.data.preprocessing import encoding
from samba_megatron.data.tokenizer import load_tokenizer
tokenizer, engine = load_tokenizer(Path(sys.argv[1])), encoding.Engine.GIGATOKEN
encoding.BatchTokenizer(tokenizer, engine, True)([b"all is imported once"])
small = encoding._resident_bytes() + (40 << 20)
tokenize = encoding.BatchTokenizer(tokenizer, engine, True, memory_bytes=small)
random = np.random.default_rng(0)
for _ in range(12):
    letters = random.integers(97, 123, (100_000, 10), dtype=np.uint8)
    letters[:, 9] = 32
    tokenize([letters.tobytes()])
print(encoding._resident_bytes() - small)
"""


def test_words_are_forgotten_before_memory_runs_out(tokenizer_folder):
    """Gigatoken keeps every word it has met: on random words that would be gigabytes. In a process
    of its own, whose memory is what this takes."""
    command = [sys.executable, "-c", RANDOM_WORDS, str(tokenizer_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60 << 20
