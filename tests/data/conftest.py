"""A small real corpus, a tokenizer trained on it and the dataset they make, once a session."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from samba_megatron.data.corpus import gather_corpus
from samba_megatron.data.jsonl import read_texts
from samba_megatron.data.preprocessing.options import PreprocessOptions
from samba_megatron.data.preprocessing.run import preprocess
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and validation.jsonl: 3 MB of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    gather_corpus(folder, max_megabytes=3)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 2,048 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(read_texts([corpus / "train.jsonl"], "text"), 2048, folder, False)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The same, loaded."""
    return load_tokenizer(tokenizer_folder)


@pytest.fixture(scope="session")
def dataset(corpus: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of the corpus's training split as a dataset."""
    prefix = str(tmp_path_factory.mktemp("dataset") / "train")
    preprocess(PreprocessOptions([str(corpus / "train.jsonl")], str(tokenizer_folder), prefix))
    return prefix


@pytest.fixture(scope="session")
def held_out(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small dataset of other text: one package of the standard library."""
    folder = tmp_path_factory.mktemp("held_out")
    gather_corpus(folder, source=Path(asyncio.__file__).parent)
    prefix = str(folder / "held_out")
    preprocess(PreprocessOptions([str(folder / "train.jsonl")], str(tokenizer_folder), prefix))
    return prefix


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes lines (objects, or raw text) to a JSON lines file."""

    def write(*lines: object, name: str = "documents.jsonl") -> Path:
        path = tmp_path / name
        rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")
        return path

    return write
