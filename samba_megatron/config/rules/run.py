"""Rules of the run: its length, the schedule, the data, validation and checkpoints."""

import signal
from collections.abc import Iterator

from samba_megatron.config.rules.situation import Situation, nearest_multiples

STOPPING_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP")
"""Signals that a run may be asked to stop by."""


def length(situation: Situation) -> Iterator[str]:
    """The length is given once, and is at least a step."""
    training = situation.config.training
    if training.train_tokens is None and training.train_steps is None:
        yield ("the run has no length: give training.train_tokens (as 20B) or training.train_steps")
    elif training.train_tokens is not None and training.train_steps is not None:
        yield (
            f"training.train_tokens {training.train_tokens} and training.train_steps "
            f"{training.train_steps} are both given: set one of them to null"
        )
    elif training.train_tokens is not None and training.train_tokens < situation.first_step_tokens:
        yield (
            f"training.train_tokens {training.train_tokens} is less than the first step takes: "
            f"{situation.first_step_tokens} (batch size × data.sequence_length) or more"
        )


def learning_rates(situation: Situation) -> Iterator[str]:
    """The rate decays downwards."""
    optimizer = situation.config.optimizer
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr {optimizer.min_lr} is over optimizer.lr {optimizer.lr}: use "
            f"{optimizer.lr} or less"
        )


def warmup(situation: Situation) -> Iterator[str]:
    """The warm-up is given once, and ends before the decay does."""
    schedule = situation.config.schedule
    if schedule.lr_warmup_tokens is not None and schedule.lr_warmup_steps is not None:
        yield (
            f"schedule.lr_warmup_tokens {schedule.lr_warmup_tokens} and schedule.lr_warmup_steps "
            f"{schedule.lr_warmup_steps} are both given: set one of them to null"
        )
        return
    end = schedule.lr_decay_tokens or situation.run_tokens
    if end is None:
        return
    tokens, name = _warmup_tokens(situation, end)
    if tokens >= end:
        whole = "schedule.lr_decay_tokens" if schedule.lr_decay_tokens else "the run"
        yield f"{name} is {tokens} tokens, and {whole} {end}: the warm-up must be shorter"
    elif schedule.lr_decay_style == "WSD" and tokens > end * (1 - schedule.lr_wsd_decay_fraction):
        yield (
            f"schedule.lr_wsd_decay_fraction {schedule.lr_wsd_decay_fraction} starts the decay "
            f"before the warm-up of {tokens} tokens is over: use {1 - tokens / end:.3g} or less"
        )


def _warmup_tokens(situation: Situation, end: int) -> tuple[int, str]:
    """Length of the warm-up and the field that says it."""
    schedule = situation.config.schedule
    if schedule.lr_warmup_tokens is not None:
        return schedule.lr_warmup_tokens, "schedule.lr_warmup_tokens"
    if schedule.lr_warmup_steps is not None:
        tokens = schedule.lr_warmup_steps * situation.first_step_tokens
        return tokens, f"schedule.lr_warmup_steps {schedule.lr_warmup_steps}"
    whole = situation.run_tokens or end
    name = f"schedule.lr_warmup_fraction {schedule.lr_warmup_fraction}"
    return int(schedule.lr_warmup_fraction * whole), name


def exit_signals(situation: Situation) -> Iterator[str]:
    """The signals exist and can be caught."""
    for name in situation.config.training.exit_signals:
        if name not in STOPPING_SIGNALS or not hasattr(signal, name):
            yield (f"training.exit_signals names {name}: allowed are {', '.join(STOPPING_SIGNALS)}")


def training_data(situation: Situation) -> Iterator[str]:
    """There is training data, with weights for all datasets or none."""
    entries, files = situation.config.data.data_path, situation.config.data.blend_file
    if entries and files:
        yield (
            f"data.data_path {entries} and data.blend_file {files} are both given: keep one of "
            "them (a blend file can name any dataset)"
        )
    if files:
        return
    if not entries:
        yield "data.data_path is empty: give the prefixes of the datasets, as [corpus/train]"
        return
    yield from _prefixes("data.data_path", entries if not weighted(entries) else entries[1::2])
    if not weighted(entries):
        if any(weight_of(entry) is not None for entry in entries):
            yield (
                f"data.data_path {entries} has weights for some datasets only: give them to all "
                "([0.3, a, 0.7, b]) or to none ([a, b])"
            )
        return
    weights = [weight_of(entry) for entry in entries[::2]]
    if len(entries) % 2 or None in weights or any(weight_of(e) is not None for e in entries[1::2]):
        yield (
            f"data.data_path {entries} does not alternate weights and prefixes: write "
            "[0.3, a, 0.7, b]"
        )
    for weight in weights:
        if weight is not None and not 0 < weight < float("inf"):
            yield f"data.data_path has the weight {weight:g}: weights must be more than 0"


def weight_of(entry: str) -> float | None:
    """The number that an entry of ``data_path`` is, if it is one."""
    try:
        return float(entry)
    except ValueError:
        return None


def weighted(entries: list[str]) -> bool:
    """Whether ``data_path`` gives weights: it then begins with one."""
    return bool(entries) and weight_of(entries[0]) is not None


def _prefixes(name: str, prefixes: list[str]) -> Iterator[str]:
    for prefix in prefixes:
        if prefix.endswith((".bin", ".idx")):
            yield f"{name} has {prefix}: give the prefix without the ending, {prefix[:-4]}"


def packed_documents(situation: Situation) -> Iterator[str]:
    """Documents that were put together by their lengths do not see each other."""
    data = situation.config.data
    if data.packing == "best_fit" and not data.reset_at_document_boundaries:
        yield (
            "data.packing best_fit puts documents together by their lengths, and "
            "data.reset_at_document_boundaries false lets them see each other: use true, or "
            "data.packing concatenate"
        )


def scan_of_documents(situation: Situation) -> Iterator[str]:
    """mamba-ssm's scan carries its state from document to document."""
    config = situation.config
    scan = config.kernels.selective_scan
    if scan == "mamba_ssm" and "M" in situation.layers and config.data.reset_at_document_boundaries:
        yield (
            "kernels.selective_scan mamba_ssm cannot keep documents apart: use auto, or set "
            "data.reset_at_document_boundaries to false"
        )


def held_out_data(situation: Situation) -> Iterator[str]:
    """Held-out data is given, or split off, where validation is asked for."""
    config = situation.config
    data, validation = config.data, config.validation
    yield from _prefixes("data.valid_data_path", data.valid_data_path)
    parts = _split_parts(data.split)
    if parts is None or sum(parts) <= 0:
        yield (
            f"data.split is {data.split!r}: it must be the parts for training, validation and "
            "test, as 98,2,0"
        )
        return
    if data.valid_data_path:
        return
    if parts[0] == 0:
        yield f"data.split {data.split!r} leaves nothing for training: use 98,2,0"
    wanted = validation.eval_interval is not None or validation.eval_at_start
    if wanted and parts[1] == 0:
        field = "eval_at_start true" if validation.eval_at_start else "eval_interval"
        yield (
            f"data.split {data.split!r} leaves nothing for validation, which validation.{field} "
            "asks for: give data.valid_data_path, or use 98,2,0"
        )


def _split_parts(split: str) -> list[float] | None:
    """The numbers of ``data.split``, three with the left out ones; None if it is no split."""
    parts = [weight_of(part) for part in split.split(",")]
    numbers = [part for part in parts if part is not None and 0 <= part < float("inf")]
    return [*numbers, 0.0, 0.0][:3] if len(numbers) == len(parts) <= 3 else None


def validation_lengths(situation: Situation) -> Iterator[str]:
    """Each context length is given once, is positive, and fits the tokens of a validation."""
    validation = situation.config.validation
    lengths = validation.sequence_lengths
    for value in lengths:
        if value < 1:
            yield f"validation.sequence_lengths has {value}: lengths must be 1 or more"
        elif lengths.count(value) > 1:
            yield f"validation.sequence_lengths has {value} more than once: give each length once"
            break
    longest = max(situation.evaluated_lengths)
    if longest > validation.eval_tokens:
        yield (
            f"validation.eval_tokens {validation.eval_tokens} is less than one sequence of "
            f"{longest}: use {longest} or more, or shorter validation.sequence_lengths"
        )


def checkpoints(situation: Situation) -> Iterator[str]:
    """Milestones are among the saves, and what shall be loaded has a source."""
    checkpoint = situation.config.checkpoint
    interval, milestone = checkpoint.save_interval, checkpoint.milestone_interval
    if milestone is not None and interval is None:
        yield (
            f"checkpoint.milestone_interval {milestone} needs checkpoint.save_interval, of which "
            "it must be a multiple: set both or none"
        )
    elif milestone is not None and interval is not None and milestone % interval:
        yield (
            f"checkpoint.milestone_interval {milestone} is not a multiple of "
            f"checkpoint.save_interval {interval}: use "
            f"{nearest_multiples(milestone, interval)}"
        )
    if checkpoint.load_weights_only and checkpoint.load is None:
        yield (
            "checkpoint.load_weights_only true needs checkpoint.load, the folder to take the "
            "weights from: give both or none"
        )


def faults(situation: Situation) -> Iterator[str]:
    """A hang is reported before torch ends the run for it, and going back has somewhere to go."""
    config = situation.config
    limit, timeout = config.faults.hang_timeout_minutes, config.parallel.distributed_timeout_minutes
    if config.faults.watchdog and limit is not None and limit >= timeout:
        yield (
            f"faults.hang_timeout_minutes {limit:g} is not under "
            f"parallel.distributed_timeout_minutes {timeout:g}, which ends a run without a report "
            "of the culprit: raise the latter, or lower the former"
        )
    if config.faults.skip_spikes and config.faults.spike_window < 16:
        yield (
            f"faults.spike_window {config.faults.spike_window} is too short to tell what is usual: "
            "use 16 or more"
        )


def profile(situation: Situation) -> Iterator[str]:
    """The profile ends after it begins."""
    logging = situation.config.logging
    start, end = logging.profile_step_start, logging.profile_step_end
    if end is not None and (start is None or end <= start):
        yield (
            f"logging.profile_step_end is {end} and profile_step_start {start}: profile from a "
            "step to before a later one"
        )


RULES = (
    length,
    learning_rates,
    warmup,
    exit_signals,
    training_data,
    packed_documents,
    scan_of_documents,
    held_out_data,
    validation_lengths,
    checkpoints,
    faults,
    profile,
)
