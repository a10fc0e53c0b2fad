"""tools/generate.py: continues a prompt with an export, and refuses nonsense in a sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[3]


def generate(*options: object) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, str(ROOT / "tools" / "generate.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small export with a tokenizer of sixty letters."""
    path = tmp_path_factory.mktemp("generate") / "samba"
    shutil.copytree(exports[0]["samba"], path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def test_continues_and_says_what_it_cost(folder: Path) -> None:
    """The same text each time, and a cache that does not grow once the window is full."""
    prompt = ("--model", folder, "--prompt", "012345", "--device", "cpu")
    first, again = (generate(*prompt, "--max-new-tokens", "40") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("012345")
    assert "6 tokens read in" in first.stderr and "40 written at" in first.stderr
    longer = generate(*prompt, "--max-new-tokens", "80", "--temperature", "0.7")
    assert longer.stdout != first.stdout
    held = [text.stderr.split("the cache holds ")[1].split()[0] for text in (first, longer)]
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "/nowhere", "--prompt", "x"], "/nowhere has no config.json"),
        (["--model", "/nowhere", "--prompt", ""], "the prompt is empty"),
        (["--model", "/nowhere", "--prompt-file", "/nowhere/text"], "No such file"),
        (["--model", "/", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--model", "/", "--prompt", "x", "--temperature", "0"], "--temperature must be over 0"),
        (["--model", "/", "--prompt", "x", "--top-p", "2"], "--top-p is 2.0"),
    ],
)
def test_mistakes_are_one_sentence(options: list[str], said: str) -> None:
    """Code 2, no traceback."""
    result = generate(*options)
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
