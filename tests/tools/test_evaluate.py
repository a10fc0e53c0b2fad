"""tools/evaluate.py and make_retrieval_data.py as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evaluation import conftest

ROOT = Path(__file__).parents[2]

text, tokenizer = conftest.text, conftest.tokenizer
checkpoint, exported = conftest.checkpoint, conftest.exported


def run(tool: str, *arguments: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"{ROOT}/tools/{tool}.py", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == expect, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_two_ranks_on_a_checkpoint_find_what_one_finds_on_its_export(
    checkpoint, exported, tokenizer, tmp_path
):
    options = ("--suite", "passkey", "--lengths", "160,200", "--depths", 2, "--keys", 2)
    one = run(
        *("evaluate", "--checkpoint", exported, "--output", tmp_path / "one", *options),
        *("--device", "cpu", "--batch-size", 1),
    )
    assert "passkey: 8 of 8 cases" in one.stdout
    assert (tmp_path / "one" / "passkey.png").exists()
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", f"{ROOT}/tools/evaluate.py", *map(str, options)]
    command += ["--checkpoint", str(checkpoint), "--output", str(tmp_path / "two")]
    command += ["--tokenizer", str(tokenizer.path.parent)]
    two = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, cwd=ROOT)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("passkey: 8 of 8 cases") == 1
    found = [_answers(tmp_path / name) for name in ("one", "two")]
    assert found[0] == found[1] and len(found[0]) == 8
    assert len(list((tmp_path / "two").glob("cases-*.jsonl"))) == 2


def _answers(folder: Path) -> dict[str, str]:
    lines = [
        line for file in folder.glob("cases-*") for line in file.read_text("utf-8").splitlines()
    ]
    return {record["case"]: record["answer"] for record in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "perplexity"], "perplexity needs --data"),
        (["--suite", "passkey"], "there is no folder /nowhere"),
        (["--suite", "passkey", "--keys", "0"], "--keys is 0: use 1 or more"),
        (["--suite", "passkey", "--lengths", "4K"], "'4K' is not a list of numbers"),
        (["--suite", "lm-eval"], "lm-eval needs a Hugging Face folder.* to-hf --checkpoint"),
    ],
)
def test_mistakes_are_one_sentence(options, message, tmp_path):
    import re

    result = run(
        *("evaluate", "--checkpoint", "/nowhere", "--output", tmp_path / "x", *options), expect=2
    )
    assert re.search(message, result.stderr)
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.timeout(600)  # lm-eval alone imports for seconds
def test_lm_eval_runs_a_task(exported, tmp_path):
    pytest.importorskip("lm_eval")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"text": "def ", "answer": 0}\n{"text": "import ", "answer": 1}\n')
    (tmp_path / "task.yaml").write_text(
        "task: names\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs:\n  data_files:\n    test: {questions}\n"
        "doc_to_text: '{{text}}'\ndoc_to_choice: ['main', 'os']\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n"
    )
    options: list[object] = ["--suite", "lm-eval", "--checkpoint", exported, "--device", "cpu"]
    options += ("--task-folder", tmp_path, "--output", tmp_path / "out")
    result = run("evaluate", *options, "--tasks", "names")
    assert "names  acc,none  " in result.stdout
    assert "names" in json.loads((tmp_path / "out" / "results.json").read_text())["results"]


def test_retrieval_data_are_the_same_each_time(tokenizer, tmp_path):
    folder = tokenizer.path.parent
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        made = run(
            *("make_retrieval_data", "passkey", "--tokenizer", folder, "--length", 300),
            *("--count", 5, "--output", file),
        )
        assert "5 documents" in made.stdout
    assert files[0].read_bytes() == files[1].read_bytes()
    run("make_retrieval_data", "phonebook", "--count", 3, "--text", "--output", tmp_path / "c")
    lines = [json.loads(line) for line in (tmp_path / "c").read_text().splitlines()]
    assert [list(line) for line in lines] == [["text"]] * 3
    wrong = ("make_retrieval_data", "phonebook", "--fewest", 90, "--count", 1, "--output")
    assert "--fewest is 90: it must be between 1" in run(*wrong, tmp_path / "d", expect=2).stderr
