"""Saves checkpoints of several small models from a world of four: two tensor-parallel ranks, two
pipeline stages.

python -m tests.checkpoint.huggingface.save_models FOLDER
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from samba_megatron.checkpoint.state import Progress, TrainState
from samba_megatron.checkpoint.store import CheckpointStore
from samba_megatron.config import CheckpointConfig, ModelConfig, ParallelConfig, RunConfig
from samba_megatron.platform import distributed

MODELS: dict[str, dict[str, Any]] = {
    "every layer": {"hybrid_layer_pattern": "M-*-M-F-"},
    "untied bf16": {
        "hybrid_layer_pattern": "M-*-M-F-",
        "share_embeddings_and_output_weights": False,
    },
    "samba": {"hybrid_layer_pattern": "M-*- x2", "ffn_hidden_size": 256},
    "ablation": {
        "hybrid_layer_pattern": "M*- x2",
        "position_embedding_type": "none",
        "short_convolution": True,
        "kv_channels": 16,
        "dt_rank": 3,
    },
}


def config_of(name: str) -> RunConfig:
    sizes = {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 320,
        "window_size": 12,
    }
    config = RunConfig(name=name, model=ModelConfig(**{**sizes, **MODELS[name]}))
    config.precision.params_dtype = "bf16" if "bf16" in name else "fp32"
    config.parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    config.data.sequence_length = 64
    return config


def unlike_any_other(chunk: torch.nn.Module) -> None:
    """Gives norms, D and the like, which start as ones, values of their own."""
    with torch.no_grad():
        for number, parameter in enumerate(chunk.parameters()):
            wave = torch.sin(torch.arange(parameter.numel()) + number).view(parameter.shape)
            parameter.add_(0.1 * wave.to(parameter.dtype))


def main() -> None:
    distributed.initialize(config_of("samba").parallel)
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from samba_megatron.model.samba import build_model

    model_parallel_cuda_manual_seed(1)
    for name in MODELS:
        config = config_of(name)
        chunks = build_model(config, "local")
        unlike_any_other(chunks[0])
        progress = Progress(
            step=7,
            consumed_samples=56,
            consumed_tokens=3584,
            data_identity={"tokenizer": None},
            config=dataclasses.asdict(config),
        )
        target = Path(sys.argv[1]) / name
        store = CheckpointStore(CheckpointConfig(save=str(target), async_save=False))
        store.save(TrainState(model=chunks, progress=progress), blocking=True)
        store.close()
    distributed.shutdown()


if __name__ == "__main__":
    main()
