"""Puts a run together: checks, world, model, optimizer, schedule, data, checkpoint folder.

Each phase is timed and said, because at scale the time before the first step is paid by every
device.
"""

import dataclasses
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
    from samba_megatron.data.samples import BlendedSamples
    from samba_megatron.data.stream import SampleDataset


@dataclass
class Run:
    """All that the loop works with."""

    config: RunConfig
    rank: distributed.Rank
    run_dir: Path
    console: RunConsole
    kernels: dict[str, str]
    """What computes what, as every rank has it."""
    state: TrainState
    store: CheckpointStore
    length: RunLength
    batches: BatchSchedule
    train_dataset: "BlendedSamples"
    valid_dataset: "SampleDataset | None"
    resumed: bool = False
    phases: dict[str, float] = field(default_factory=dict)
    corrupt_checkpoints: list[str] = field(default_factory=list)
    """What is wrong with checkpoints that are newer than the one the run goes on from."""


def set_up(config: RunConfig, rank: distributed.Rank, phases: dict[str, float]) -> Run:
    """Builds the run in a world that is up, and restores its state if there is a checkpoint.

    Args:
        config: checked, with its paths resolved.
        rank: this process's place.
        phases: seconds of the phases before; the rest is added.

    Raises:
        UserError: for everything that is wrong with the input, before long work begins.
    """
    from samba_megatron.training.chosen_kernels import agree_on_kernels

    kernels = agree_on_kernels(config)
    _seed_everything(config)
    run_dir = Path(str(config.run_dir))
    console = RunConsole(run_dir, speaks=rank.rank == 0, progress=config.logging.progress)
    store = CheckpointStore(config.checkpoint, notice=console.warn)
    length, batches = run_length(config), BatchSchedule.from_config(config)
    with timed(phases, "data"):
        saved = store.find()
        identity, consumed = _identify_data(config, saved, console)
        samples = samples_to_build(config, length, saved.progress if consumed and saved else None)
        train, valid = build_data(config, samples, consumed)
    with timed(phases, "model"):
        state = _build_state(config, length)
    state.progress = Progress(data_identity=identity, config=to_dict(config))
    run = Run(
        config,
        rank,
        run_dir,
        console,
        kernels,
        state,
        store,
        length,
        batches,
        train,
        valid,
        phases=phases,
        corrupt_checkpoints=saved.corrupt if saved else [],
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
    from samba_megatron.data.identity import blend_changes, identity_differences

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
    for notice in [] if weights_only else blend_changes(saved.progress.data_identity, identity):
        console.warn(f"{notice}, from here on")


def _identify_data(
    config: RunConfig, saved: SavedRun | None, console: RunConsole
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Who the data are, and the ledger of what has been consumed of them."""
    from samba_megatron.data.datasets import on_first_rank
    from samba_megatron.data.identity import dataset_identity
    from samba_megatron.data.made_with import other_tokenizers

    data, seed = config.data, config.training.seed
    identity, notices = on_first_rank(
        lambda: (dataset_identity(data, seed), other_tokenizers(data))
    )
    for notice in notices:
        console.warn(notice)
    _compare_with_saved(config, saved, identity, console)
    if saved is None or _takes_weights_only(config, saved):
        return identity, {}
    return identity, _ledger(saved.progress)


def _ledger(progress: Progress) -> dict[str, Any]:
    """What a checkpoint says has been consumed of each source."""
    if progress.consumed_samples and not progress.data_consumed:
        raise UserError(
            "the checkpoint has no ledger of the data (an earlier version saved it): start anew "
            "from its weights with another checkpoint.save folder and checkpoint.load_weights_only"
        )
    return progress.data_consumed


def samples_to_build(config: RunConfig, length: RunLength, progress: Progress | None) -> int:
    """Training samples that the run needs: for its steps, and those that rollbacks went past.

    Args:
        config: the run's configuration.
        length: of the run.
        progress: where it goes on from, if not from the beginning.
    """
    if progress is None:
        return length.samples
    done = progress.consumed_tokens // config.data.sequence_length
    return length.samples + progress.consumed_samples - done


def build_data(
    config: RunConfig, samples: int, consumed: dict[str, Any]
) -> "tuple[BlendedSamples, SampleDataset | None]":
    """Training and validation samples; every rank calls it.

    Args:
        config: the run's configuration.
        samples: how many for training; their order does not depend on the number.
        consumed: the ledger that the run goes on from.
    """
    from samba_megatron.data.datasets import build_train_and_valid
    from samba_megatron.data.tokenizer import load_tokenizer

    data, seed, vocab_size = config.data, config.training.seed, config.model.vocab_size
    tokens = load_tokenizer(data.tokenizer).vocab_size if data.tokenizer else 0
    if tokens > vocab_size:
        raise UserError(
            f"the tokenizer {data.tokenizer} has {tokens} tokens, more than model.vocab_size "
            f"{vocab_size}: raise model.vocab_size"
        )
    from_split = 0 if data.valid_data_path else _validation_samples(config)
    return build_train_and_valid(data, samples, from_split, seed, vocab_size, consumed)


def _validation_samples(config: RunConfig) -> int:
    validation = config.validation
    wanted = validation.eval_interval or validation.eval_at_start or validation.eval_at_end
    return max(validation.eval_tokens // config.data.sequence_length, 1) if wanted else 0


def _build_state(config: RunConfig, length: RunLength) -> TrainState:
    from samba_megatron.model.backend import choose_implementation
    from samba_megatron.model.samba import build_model
    from samba_megatron.training.data_parallel import (
        configure_schedule,
        fuse_gradient_accumulation,
        wrap,
    )
    from samba_megatron.training.optimizer import build_optimizer, build_schedule

    implementation = choose_implementation(
        config.kernels.transformer_impl, distributed.device_type()
    )
    chunks = wrap(build_model(config, implementation), config.parallel, config.precision)
    if config.kernels.gradient_accumulation_fusion:
        fuse_gradient_accumulation(chunks)
    optimizer = build_optimizer(config, chunks)
    configure_schedule(chunks, optimizer, config.parallel)
    schedule = build_schedule(config, optimizer, length)
    return TrainState(chunks, optimizer, schedule)


def _restore(run: Run) -> None:
    run.store.preflight(run.state)
    progress = run.store.load(run.state)
    if progress is not None:
        run.resumed = progress.step > 0
        run.train_dataset.go_on_from(_ledger(progress))
        run.state.progress = restored(progress, run.state.progress)


def restored(saved: Progress, own: Progress) -> Progress:
    """A checkpoint's progress, with the data and the configuration of this start."""
    return dataclasses.replace(saved, data_identity=own.data_identity, config=own.config)
