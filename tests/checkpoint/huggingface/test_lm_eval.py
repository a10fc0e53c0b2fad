"""lm-evaluation-harness scores an export without any code of its own for it."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval")

TEXTS = ["a long time ago", "in a text far away", "there was a model of some size"]
CHOICES: list[dict[str, Any]] = [
    {"question": "a long", "choices": [" time", " text"], "answer": 0},
    {"question": "in a text", "choices": [" time ago", " far away"], "answer": 1},
    {"question": "there was", "choices": [" a model", " ago", " far"], "answer": 0},
]
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a tokenizer, tasks, and what the command has written."""
    folder = tmp_path_factory.mktemp("lm_eval")
    train_tokenizer(TEXTS, 300, folder / "tokenizer", show_progress=False)
    export(
        ExportOptions(
            *(checkpoints["samba"], folder / "samba-hf"),
            tokenizer=folder / "tokenizer",
            compare="tensors",
        ),
        print,
    )
    texts = [{"text": text} for text in TEXTS]
    rows: dict[str, Any] = {"local_choice": CHOICES, "local_text": texts}
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        content = {"task": name, "test_split": "test", **source, **task}
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"),
        "pretrained=samba-hf,trust_remote_code=True,dtype=float32",
        *("--tasks", "local_choice,local_text", "--include_path", "tasks"),
        *("--device", "cpu", "--batch_size", "2", "--output_path", "results"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    environment = {**os.environ, **offline, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def negative_log_likelihood(model: Any, tokenizer: Any, before: str, text: str) -> float:
    """Of ``text`` after ``before`` (nothing: after the end of a document), in nats."""
    context = tokenizer(before)["input_ids"] if before else [tokenizer.eos_token_id]
    target = tokenizer(before + text)["input_ids"][len(context) if before else 0 :]
    ids = torch.tensor([context + target])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, len(context) - 1 : -1]
    return -float(scores.gather(1, torch.tensor(target)[:, None]).sum())


def test_scores_are_those_of_the_model(folder: Path, own_modules: None) -> None:
    (file,) = (folder / "results").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    model = AutoModelForCausalLM.from_pretrained(folder / "samba-hf", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder / "samba-hf")
    nats = sum(negative_log_likelihood(model, tokenizer, "", text) for text in TEXTS)
    bits = nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["local_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    right = 0
    for row in CHOICES:
        scores = [
            negative_log_likelihood(model, tokenizer, row["question"], choice)
            for choice in row["choices"]
        ]
        right += scores.index(min(scores)) == row["answer"]
    assert results["local_choice"]["acc,none"] == pytest.approx(right / len(CHOICES))
