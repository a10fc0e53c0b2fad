"""lm-eval's tasks on a Hugging Face folder, where lm-eval is installed."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_megatron.evaluation.subject import is_huggingface
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import write_text

PAPER_TASKS = ("lambada_openai", "arc_easy", "winogrande", "hellaswag", "piqa")
"""The zero-shot tasks of the paper."""
RESULTS = "results.json"


@dataclass(frozen=True)
class HarnessOptions:
    """What lm-eval is to do."""

    model: Path
    tasks: tuple[str, ...]
    output: Path
    device: str
    dtype: str
    """As transformers calls it: ``auto``, ``bfloat16``, ``float32``."""
    batch_size: int
    limit: int | None = None
    """Questions of each task, at most."""
    task_folder: Path | None = None
    """Further tasks (YAML), besides those that lm-eval brings."""


def require_harness(model: Path) -> None:
    """Makes sure that lm-eval can be used on a folder.

    Raises:
        UserError: it is not installed, or the folder is not in Hugging Face format.
    """
    if not is_huggingface(model):
        raise UserError(
            f"lm-eval needs a Hugging Face folder and {model} is none: make one with "
            f"convert_checkpoint.py to-hf --checkpoint {model} --output FOLDER"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: uv pip install lm-eval")


def run_harness(options: HarnessOptions) -> dict[str, Any]:
    """Runs the tasks and writes ``results.json``.

    Returns:
        lm-eval's figures by task.

    Raises:
        UserError: :func:`require_harness`, or lm-eval does not know a task.
    """
    require_harness(options.model)
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = options.task_folder
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in options.tasks if task not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: lm-eval has no such task")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(options.model),
            "trust_remote_code": True,
            "dtype": options.dtype,
        },
        tasks=list(options.tasks),
        device=options.device,
        batch_size=options.batch_size,
        limit=options.limit,
        task_manager=manager,
    )
    figures: dict[str, Any] = found["results"]
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"suite": "lm-eval", "model": str(options.model.resolve()), "results": figures}
    write_text(options.output / RESULTS, json.dumps(content, indent=2, default=str) + "\n")
    return figures
