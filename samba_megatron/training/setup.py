"""Puts a run together: checks, world, model, optimizer, schedule, data, checkpoint folder.

Each phase is timed and said, because at scale the time before the first step is paid by every
device.
"""

import dataclasses
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_megatron.checkpoint.state import Progress, TrainState
from samba_megatron.checkpoint.store import CheckpointStore, SavedRun
from samba_megatron.config import RunConfig
from samba_megatron.config.load import to_dict
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import UserError
from samba_megatron.tracking.console import RunConsole
from samba_megatron.training.batches import BatchSchedule, RunLength, run_length

if TYPE_CHECKING:
    from samba_megatron.data.stream import SampleDataset
    from samba_megatron.model.backend import Implementation


@dataclass
class Run:
    """All that the loop works with."""

    config: RunConfig
    rank: distributed.Rank
    run_dir: Path
    console: RunConsole
    implementation: "Implementation"
    state: TrainState
    store: CheckpointStore
    length: RunLength
    batches: BatchSchedule
    train_dataset: "SampleDataset"
    valid_dataset: "SampleDataset | None"
    resumed: bool = False
    phases: dict[str, float] = field(default_factory=dict)


def set_up(config: RunConfig, rank: distributed.Rank, phases: dict[str, float]) -> Run:
    """Builds the run in a world that is up, and restores its state if there is a checkpoint.

    Args:
        config: checked, with its paths resolved.
        rank: this process's place.
        phases: seconds of the phases before; the rest is added.

    Raises:
        UserError: for everything that is wrong with the input, before long work begins.
    """
    _seed_everything(config)
    run_dir = Path(str(config.run_dir))
    console = RunConsole(run_dir, speaks=rank.rank == 0, progress=config.logging.progress)
    store = CheckpointStore(config.checkpoint, notice=console.warn)
    length, batches = run_length(config), BatchSchedule.from_config(config)
    with timed(phases, "data"):
        train, valid, identity = _build_data(config, length)
    _compare_with_saved(config, store.find(), identity, console)
    with timed(phases, "model"):
        state, implementation = _build_state(config, length)
    state.progress = Progress(data_identity=identity, config=to_dict(config))
    run = Run(
        config,
        rank,
        run_dir,
        console,
        implementation,
        state,
        store,
        length,
        batches,
        train,
        valid,
        phases=phases,
    )
    with timed(phases, "checkpoint"):
        _restore(run)
    return run


@contextmanager
def timed(phases: dict[str, float], name: str) -> Iterator[None]:
    """Notes the seconds spent inside as a phase of the start."""
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def _seed_everything(config: RunConfig) -> None:
    """Weights have their own seeds (model.initialization); these are for whatever else draws."""
    import numpy as np
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.rerun_state_machine import (
        RerunMode,
        destroy_rerun_state_machine,
        initialize_rerun_state_machine,
    )

    seed = config.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if config.training.deterministic:
        torch.use_deterministic_algorithms(True)
    destroy_rerun_state_machine()
    initialize_rerun_state_machine(mode=RerunMode(config.training.rerun_mode))


def _takes_weights_only(config: RunConfig, saved: SavedRun) -> bool:
    """Whether only the weights of ``saved`` are taken: not where it is this run's own."""
    own = saved.path.parent == Path(str(config.checkpoint.save))
    return config.checkpoint.load_weights_only and not own


def _compare_with_saved(
    config: RunConfig, saved: SavedRun | None, identity: dict[str, Any], console: RunConsole
) -> None:
    """Refuses what must not change between a checkpoint and the run that goes on from it."""
    from samba_megatron.config.compare import compare_for_resume
    from samba_megatron.data.blend import identity_differences

    if saved is None:
        return
    weights_only = _takes_weights_only(config, saved)
    for notice in compare_for_resume(saved.config, config, weights_only=weights_only):
        console.warn(notice)
    changed = identity_differences(saved.progress.data_identity, identity)
    if changed and not weights_only:
        raise UserError(
            f"the data have changed since the checkpoint {saved.path}: {'; '.join(changed)}; "
            "restore them, or start anew from its weights with another checkpoint.save folder and "
            "checkpoint.load_weights_only"
        )


def _build_data(
    config: RunConfig, length: RunLength
) -> "tuple[SampleDataset, SampleDataset | None, dict[str, Any]]":
    from samba_megatron.data.blend import dataset_identity
    from samba_megatron.data.datasets import build_train_and_valid, on_first_rank
    from samba_megatron.data.tokenizer import load_tokenizer

    data, seed, vocab_size = config.data, config.training.seed, config.model.vocab_size
    if data.tokenizer and load_tokenizer(data.tokenizer).vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer} has {load_tokenizer(data.tokenizer).vocab_size} "
            f"tokens, more than model.vocab_size {vocab_size}: raise model.vocab_size"
        )
    from_split = 0 if data.valid_data_path else _validation_samples(config)
    train, valid = build_train_and_valid(data, length.samples, from_split, seed, vocab_size)
    return train, valid, on_first_rank(lambda: dataset_identity(data, seed))


def _validation_samples(config: RunConfig) -> int:
    validation = config.validation
    wanted = validation.eval_interval or validation.eval_at_start or validation.eval_at_end
    return max(validation.eval_tokens // config.data.sequence_length, 1) if wanted else 0


def _build_state(config: RunConfig, length: RunLength) -> "tuple[TrainState, Implementation]":
    from samba_megatron.model.backend import choose_implementation
    from samba_megatron.model.samba import build_model
    from samba_megatron.training.data_parallel import configure_schedule, wrap
    from samba_megatron.training.optimizer import build_optimizer, build_schedule

    implementation = choose_implementation(
        config.kernels.transformer_impl, distributed.device_type()
    )
    chunks = wrap(build_model(config, implementation), config.parallel, config.precision)
    optimizer = build_optimizer(config, chunks)
    configure_schedule(chunks, optimizer, config.parallel)
    schedule = build_schedule(config, optimizer, length)
    return TrainState(chunks, optimizer, schedule), implementation


def _restore(run: Run) -> None:
    run.store.preflight(run.state)
    saved = run.store.find()
    if saved is not None and saved.path.parent == Path(str(run.config.checkpoint.save)):
        # Delayed scaling's FP8 state is a pickle, which Transformer Engine loads only from a
        # checkpoint that is said to be trusted: this run's own is.
        os.environ.setdefault("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    progress = run.store.load(run.state)
    if progress is not None:
        identity, config = run.state.progress.data_identity, run.state.progress.config
        run.resumed = progress.step > 0
        run.state.progress = dataclasses.replace(progress, data_identity=identity, config=config)
