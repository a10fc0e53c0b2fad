"""A small training run out of the real parts, for the processes that the tests start."""

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samba_megatron.checkpoint.state import Progress, TrainState
from samba_megatron.checkpoint.store import CheckpointStore
from samba_megatron.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainingConfig,
)
from samba_megatron.platform import distributed

if TYPE_CHECKING:
    from samba_megatron.training.step import StepResult

SEQUENCE, BATCH, STEPS = 16, 4, 6
BUCKET = 3000
"""Parameters a gradient bucket: several, whose ends need padding (only with overlap)."""


def tiny_config(
    dtype: str = "fp32", pattern: str = "M-*-", hidden: int = 32, **parallel: Any
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            hybrid_layer_pattern=pattern,
            hidden_size=hidden,
            ffn_hidden_size=64,
            num_attention_heads=4,
            window_size=8,
            vocab_size=64,
            d_state=4,
        ),
        data=DataConfig(sequence_length=SEQUENCE),
        precision=PrecisionConfig(params_dtype=dtype),  # type: ignore[arg-type]
        parallel=ParallelConfig(
            overlap_param_gather=False,
            overlap_grad_reduce=True,
            ddp_bucket_size=BUCKET,
            **parallel,
        ),
        training=TrainingConfig(
            train_steps=STEPS, global_batch_size=BATCH, micro_batch_size=1, rerun_mode="disabled"
        ),
    )


class TinyRun:
    """Model, optimizer and schedule of a configuration, and its data: the same in any layout."""

    def __init__(self, config: RunConfig) -> None:
        from samba_megatron.model.samba import build_model
        from samba_megatron.training.batches import run_length
        from samba_megatron.training.data_parallel import configure_schedule, wrap
        from samba_megatron.training.optimizer import build_optimizer, build_schedule
        from samba_megatron.training.spikes import watch_grad_norm

        chunks = wrap(build_model(config, "local"), config.parallel, config.precision)
        optimizer = build_optimizer(config, chunks)
        configure_schedule(chunks, optimizer, config.parallel)
        self.grad_norm = watch_grad_norm(optimizer)
        self.state = TrainState(
            model=chunks,
            optimizer=optimizer,
            scheduler=build_schedule(config, optimizer, run_length(config)),
            progress=Progress(config=dataclasses.asdict(config), data_identity={"seed": 1}),
        )

    def train(self, until: int) -> list[float]:
        """Steps on to step ``until``; the losses."""
        losses, progress = [], self.state.progress
        while progress.step < until:
            batches = _micro_batches(progress.step)
            result = self.step(batches)
            self.state.scheduler.step(BATCH * SEQUENCE)  # type: ignore[union-attr]
            losses.append(result.loss)
            progress.step += 1
            progress.consumed_samples += BATCH
            progress.consumed_tokens += BATCH * SEQUENCE
        return losses

    def step(self, batches: list[Any], **more: Any) -> "StepResult":
        """One step, without what is counted."""
        from samba_megatron.training.step import train_step

        state = self.state
        return train_step(
            state.model, state.optimizer, batches, SEQUENCE, 1, self.grad_norm, **more
        )

    def load(self, store: CheckpointStore) -> Progress:
        progress = store.load(self.state)
        assert progress is not None
        self.state.progress = dataclasses.replace(progress)
        return progress

    def fingerprint(self) -> str:
        """Hash of this rank's weights, and the optimizer's fp32 copies, moments and steps."""
        digest = hashlib.sha256()
        for chunk in self.state.modules:
            for name, value in chunk.named_parameters():
                digest.update(name.encode() + _bytes(value))
        for part in self.state.optimizer.chained_optimizers:  # type: ignore[union-attr]
            for group in part.optimizer.param_groups:
                for value in group["params"]:
                    digest.update(_bytes(value))
                    for name, moment in sorted(part.optimizer.state[value].items()):
                        digest.update(name.encode() + _bytes(moment))
        return digest.hexdigest()


def start(config: RunConfig) -> None:
    """Joins the world, with seeds and megatron's rerun state machine."""
    from megatron.core.rerun_state_machine import RerunMode, initialize_rerun_state_machine
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    distributed.initialize(config.parallel)
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1)
    initialize_rerun_state_machine(mode=RerunMode.DISABLED)


def store_in(folder: Path | str, notices: list[str] | None = None, **options: Any) -> Any:
    config = CheckpointConfig(**{"save": str(folder), "keep_last": 0, **options})
    return CheckpointStore(config, notice=(notices if notices is not None else []).append)


def whole_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its key."""
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

    content = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in content.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(tensors, storage_reader=FileSystemReader(path), no_dist=True)
    return tensors


def _micro_batches(step: int) -> list[Any]:
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 64, (BATCH, SEQUENCE + 1), generator=generator)
    rank = parallel_state.get_data_parallel_rank()
    positions = torch.arange(SEQUENCE).unsqueeze(0)
    mask = torch.ones(1, SEQUENCE)
    return [
        {
            "tokens": row[None, :-1],
            "labels": row[None, 1:],
            "loss_mask": mask,
            "position_ids": positions,
        }
        for row in tokens[rank :: parallel_state.get_data_parallel_world_size()]
    ]


def _bytes(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        if (tensor.dim())
        else str(tensor.item()).encode()
    )
