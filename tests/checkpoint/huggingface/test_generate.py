"""tools/generate.py: continues a prompt with a checkpoint or an export, and refuses nonsense in a
sentence."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from samba_megatron.platform.errors import UserError
from tools import generate

ROOT = Path(__file__).parents[3]
PROMPT, VOCABULARY = "0123456789" * 3, 320


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of sixty letters, and of the model's other tokens, which no text becomes."""
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:60]]
    alphabet += [f"<{number}>" for number in range(len(alphabet), VOCABULARY)]
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("letters")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(exports, letters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small export with that tokenizer."""
    path = tmp_path_factory.mktemp("generate") / "samba"
    shutil.copytree(exports[0]["samba"], path)
    shutil.copytree(letters, path, dirs_exist_ok=True)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_modules: None):
    """The command within this process; what it wrote to stdout and stderr."""

    def command(*options: object) -> tuple[str, str]:
        arguments = ["generate.py", *map(str, options), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        generate.main()
        captured = capsys.readouterr()
        return captured.out, captured.err

    return command


def test_continues_and_says_what_it_cost(folder: Path, run) -> None:
    """The same text each time, and a cache that does not grow once the window is full."""
    prompt = ("--model", folder, "--prompt", "012345", "--max-new-tokens")
    command = [sys.executable, ROOT / "tools" / "generate.py", *prompt, 40, "--device", "cpu"]
    alone = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    text, said = run(*prompt, 40)
    assert alone.stdout == text and text.startswith("012345") and len(text) > 12
    assert "6 tokens read, the first new one after" in said and "40 written at" in said
    longer, more = run(*prompt, 80, "--temperature", "0.7")
    assert longer != text and longer == run(*prompt, 80, "--temperature", "0.7")[0]
    assert longer != run(*prompt, 80, "--temperature", "0.7", "--seed", 2)[0]
    held = [text.split("the cache holds ")[1].split()[0] for text in (said, more)]
    assert held[0] == held[1]


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["every layer", "samba", "ablation"])
def test_a_checkpoint_continues_as_its_export_in_any_pieces(
    name: str, sampling: tuple, checkpoints: dict[str, Path], exports, letters: Path, run
) -> None:
    """Saved by TP 2 × PP 2; beyond the window, which is 12. A folder of checkpoints likewise."""
    options = ("--tokenizer", letters, "--prompt", PROMPT, "--max-new-tokens", 50, *sampling)
    whole, said = run("--checkpoint", checkpoints[name], *options)
    assert whole.startswith(PROMPT) and len(whole) > len(PROMPT) + 50
    assert "30 tokens read" in said and "tokens, " not in said
    for piece in (1, 7):
        text, said = run("--checkpoint", checkpoints[name].parent, *options, "--piece", piece)
        assert text == whole
        assert "read 30 of 30 tokens, " in said and "0 s left" in said
    assert run("--checkpoint", exports[0][name], *options, "--piece", 11)[0] == whole


def test_mistakes_in_options_are_one_sentence(run) -> None:
    """Code 2, no traceback."""
    wrong = [
        (["/nowhere", "--prompt", "x"], "there is no folder /nowhere: name a checkpoint or"),
        (["/nowhere", "--prompt", ""], "the prompt is empty"),
        (["/nowhere", "--prompt-file", "/nowhere/text"], "No such file"),
        (["/", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0: use 1 or more"),
        (["/", "--prompt", "x", "--piece", "0"], "--piece is 0: use 1 or more"),
        (["/", "--prompt", "x", "--temperature", "0"], "--temperature must be over 0"),
        (["/", "--prompt", "x", "--top-p", "2"], "--top-p is 2.0"),
    ]
    for options, said in wrong:
        with pytest.raises(UserError, match=said):
            run("--checkpoint", *options)
    tool = str(ROOT / "tools" / "generate.py")
    command = [sys.executable, tool, "--model", "/nowhere", "--prompt", "x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1


def test_two_sources_are_refused(run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--checkpoint", "/a", "--model", "/b", "--prompt", "x")
    assert stop.value.code == 2
    assert "--model: not allowed with argument --checkpoint" in capsys.readouterr().err


def test_what_cannot_be_loaded_is_named(
    checkpoints: dict[str, Path], folder: Path, letters: Path, tmp_path: Path, run
) -> None:
    """No checkpoint, another model, the wrong tokenizer, a file that is gone."""

    def refused(source: Path, said: str, *more: object) -> None:
        with pytest.raises(UserError, match=said) as error:
            run("--checkpoint", source, "--prompt", "0", *more)
        assert "\n" not in str(error.value)

    def copied(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / f"{len(list(tmp_path.iterdir()))}"))

    refused(tmp_path, "holds no checkpoint of Samba-Megatron")
    saved = checkpoints["samba"]
    refused(saved, "comes without a tokenizer: name the one of its data with --tokenizer")
    refused(saved, "cannot read the tokenizer", "--tokenizer", tmp_path)
    torn = Path(shutil.copytree(saved, tmp_path / saved.name))
    next(torn.glob("*.distcp")).unlink()
    refused(torn, "is corrupt: .*; load another one", "--tokenizer", letters)
    large = copied(letters)
    tokens = Tokenizer.from_file(str(large / "tokenizer.json"))
    tokens.add_tokens([f"word{n}" for n in range(300)])
    tokens.save(str(large / "tokenizer.json"))
    for source in (saved, folder):
        refused(source, "has 620 tokens and the model.s vocabulary", "--tokenizer", large)
    torn = copied(folder)
    next(torn.glob("*-00002-of-*.safetensors")).unlink()
    refused(torn, "cannot be loaded as a Hugging Face folder: ")
    other = copied(folder)
    (other / "config.json").write_text('{"model_type": "of_another_kind"}')
    refused(other, "cannot be loaded as a Hugging Face folder: .*of_another_kind")
    other = copied(folder)
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"hidden_size": 32', '"hidden_size": 64'))
    refused(other, "cannot be loaded as a Hugging Face folder: ")
    deeper = config.replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    (other / "config.json").write_text(deeper)
    refused(other, "is incomplete: its files lack .* and 13 more tensors; export it again")
