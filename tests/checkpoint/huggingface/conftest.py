"""Checkpoints of small models, their exports, and what our own model makes of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.checkpoint.huggingface.importing import import_model
from tests.checkpoint.huggingface.save_models import MODELS
from tests.ranks import run_ranks


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of all models, saved by TP 2 × PP 2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks("tests.checkpoint.huggingface.save_models", 4, folder)
    return {name: folder / name / "step_0000007" for name in MODELS}


@pytest.fixture(scope="session")
def exports(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Their exports, and the sentences that were said."""
    folder = tmp_path_factory.mktemp("exports")
    said: dict[str, list[str]] = {name: [] for name in checkpoints}
    for name, checkpoint in checkpoints.items():
        options = ExportOptions(
            checkpoint, folder / name.replace(" ", "_"), shard_bytes=40_000, compare="tensors"
        )
        export(options, said[name].append)
    return {name: folder / name.replace(" ", "_") for name in checkpoints}, said


@pytest.fixture(scope="session")
def imported(exports: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints made from the exports."""
    folder = tmp_path_factory.mktemp("imported")
    return {
        name: import_model(path, folder / name, lambda text: None).path
        for name, path in exports[0].items()
    }


@pytest.fixture(scope="session")
def logits(checkpoints, imported, tmp_path_factory: pytest.TempPathFactory):
    """{"saved" or "imported": {name: logits of the fixed prompts by our model}}."""
    file = tmp_path_factory.mktemp("logits") / "logits.pt"
    paths = [*checkpoints.values(), *imported.values()]
    run_ranks("tests.checkpoint.huggingface.reference_logits", 1, file, *paths)
    found = torch.load(file)
    return {
        "saved": {name: found[str(path)] for name, path in checkpoints.items()},
        "imported": {name: found[str(path)] for name, path in imported.items()},
    }
