"""Rules of the batch: sequences, data-parallel ranks, micro-batches and the batch-size ramp."""

from collections.abc import Iterator

from samba_megatron.config.rules.situation import Situation, nearest_multiples, not_multiple

RAMP = ("rampup_start_batch_size", "rampup_batch_size_increment", "rampup_tokens")


def _layout_fits(situation: Situation) -> bool:
    """Whether the number of data-parallel ranks is known; if not, another rule says why."""
    return situation.world_size % situation.replica_size == 0


def _together(situation: Situation) -> str:
    return (
        f"training.micro_batch_size {situation.config.training.micro_batch_size} × "
        f"{situation.data_parallel_size} data-parallel "
        f"rank{'s' if situation.data_parallel_size > 1 else ''} = {situation.concurrent_sequences}"
    )


def global_batch(situation: Situation) -> Iterator[str]:
    """Every data-parallel rank has the same number of micro-batches."""
    if _layout_fits(situation):
        yield from not_multiple(
            "training.global_batch_size",
            situation.config.training.global_batch_size,
            situation.concurrent_sequences,
            _together(situation),
        )


def ramp_is_whole(situation: Situation) -> Iterator[str]:
    """The ramp's fields come together."""
    training = situation.config.training
    missing = [name for name in RAMP if getattr(training, name) is None]
    if missing and len(missing) < len(RAMP):
        names = ", ".join(f"training.{name}" for name in missing)
        yield f"a batch-size ramp also needs {names}: set all three of its fields, or none"


def ramp_stages(situation: Situation) -> Iterator[str]:
    """The ramp reaches the global batch size, by stages that the ranks can share."""
    training = situation.config.training
    start, increment = training.rampup_start_batch_size, training.rampup_batch_size_increment
    if start is None or increment is None or training.rampup_tokens is None:
        return
    batch = training.global_batch_size
    if start > batch:
        yield (
            f"training.rampup_start_batch_size {start} is over training.global_batch_size {batch}: "
            f"use {batch} or less"
        )
    elif (batch - start) % increment:
        reached = start + (batch - start) // increment * increment
        yield (
            f"training.rampup_batch_size_increment {increment} does not lead from "
            f"rampup_start_batch_size {start} to training.global_batch_size {batch}: it reaches "
            f"{reached} and {reached + increment}"
        )
    if _layout_fits(situation):
        step, together = situation.concurrent_sequences, _together(situation)
        yield from not_multiple("training.rampup_start_batch_size", start, step, together)
        yield from not_multiple("training.rampup_batch_size_increment", increment, step, together)
    run_tokens = training.train_tokens
    if run_tokens is not None and training.rampup_tokens > run_tokens:
        yield (
            f"training.rampup_tokens {training.rampup_tokens} is over training.train_tokens "
            f"{run_tokens}: use {run_tokens} or less"
        )


def interleaved_micro_batches(situation: Situation) -> Iterator[str]:
    """The interleaved schedule takes micro-batches in groups of one for each pipeline stage."""
    config = situation.config
    training, stages = config.training, config.parallel.pipeline_model_parallel_size
    if config.parallel.virtual_pipeline_model_parallel_size is None or not _layout_fits(situation):
        return
    group = situation.concurrent_sequences * stages
    sizes = {
        "training.global_batch_size": training.global_batch_size,
        "training.rampup_start_batch_size": training.rampup_start_batch_size,
        "training.rampup_batch_size_increment": training.rampup_batch_size_increment,
    }
    for name, size in sizes.items():
        # A size that the ranks cannot share at all is another rule's sentence.
        if size is not None and size % situation.concurrent_sequences == 0 and size % group:
            yield (
                f"{name} {size} makes {size // situation.concurrent_sequences} micro-batches a "
                "rank, and parallel.virtual_pipeline_model_parallel_size needs a multiple of "
                f"pipeline_model_parallel_size {stages}: use "
                f"{nearest_multiples(size, group)}"
            )


RULES = (global_batch, ramp_is_whole, ramp_stages, interleaved_micro_batches)
