"""A toy run on real text (Python's own sources as bytes), and the launcher of layouts."""

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from samba_megatron.data.indexed import IndexedWriter
from samba_megatron.tracking.metrics import read_metrics
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
STEPS = 20


def write_dataset(folder: Path) -> str:
    """Some of the standard library as byte tokens (256 ids, 0 ends a document)."""
    prefix = folder / "text"
    stdlib = Path(sysconfig.get_path("stdlib"))
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for path in sorted(stdlib.glob("*.py"))[:40]:
            text = path.read_bytes()[:4000]
            writer.add_document(np.frombuffer(text + b"\0", dtype=np.uint8).astype(np.uint16))
        writer.finish()
    return str(prefix)


def write_short_documents(folder: Path) -> str:
    """The same text in documents of 2 to 90 tokens: shorter and longer than a toy's sample."""
    prefix = folder / "short"
    text = np.fromfile(f"{write_dataset(folder)}.bin", np.uint16)
    lengths = np.random.default_rng(5).integers(2, 91, len(text) // 90)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for document in np.split(text, np.cumsum(lengths))[:-1]:
            writer.add_document(document)
        writer.finish()
    return str(prefix)


def toy_config(prefix: str, run_dir: Path, **fields: Any) -> dict[str, Any]:
    """Fields of a tiny fp32 Samba: two blocks of each kind, a window shorter than the sequence."""
    return {
        "run_dir": str(run_dir),
        "model.hybrid_layer_pattern": "M-*- x2",
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "model.num_attention_heads": 4,
        "model.num_query_groups": 2,
        "model.vocab_size": 256,
        "model.window_size": 24,
        "precision.params_dtype": "fp32",
        "data.data_path": [prefix],
        "data.split": "100,0,0",
        "data.sequence_length": 64,
        # The documents are longer than samples; where they stay apart has tests of its own.
        "data.reset_at_document_boundaries": False,
        "training.train_steps": STEPS,
        "training.micro_batch_size": 2,
        # Four micro-batches a step: as many as the interleaved pipeline needs on two ranks.
        "training.global_batch_size": 8,
        "optimizer.lr": 1e-2,
        "optimizer.min_lr": 1e-3,
        "optimizer.clip_grad": 1.0,
        "schedule.lr_warmup_steps": 2,
        "validation.eval_at_end": False,
        "checkpoint.save_at_end": False,
        "logging.progress": "plain",
        **fields,
    }


def launch(
    processes: int, specs: list[dict[str, Any]], folder: Path, program: str = "run_layouts"
) -> None:
    """Runs the specifications in a world of ``processes``."""
    file = folder / f"specs_{processes}_{abs(hash(json.dumps(specs)))}.json"
    file.write_text(json.dumps(specs))
    run_ranks(f"tests.distributed.{program}", processes, file, timeout=1500)


def losses(run_dir: Path, kind: str = "train") -> list[float]:
    """The training (or validation) losses of a run, by step."""
    return [record["loss"] for record in read_metrics(run_dir / "metrics.jsonl", kind)]


def saved_tensors(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The whole tensors of a checkpoint whose keys begin with ``prefix``, which is left out."""
    reader = FileSystemReader(str(checkpoint))
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in described.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    assert tensors, f"{checkpoint} has nothing under {prefix}"
    load(tensors, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
