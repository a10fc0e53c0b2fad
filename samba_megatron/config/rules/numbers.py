"""Bounds of single numbers. The other rules divide by some of these, so they are checked first."""

from collections.abc import Iterator

from samba_megatron.config.fields import flatten
from samba_megatron.config.pattern import expand_pattern
from samba_megatron.config.rules.situation import Situation
from samba_megatron.platform.errors import UserError

POSITIVE = frozenset(
    [
        "model.hidden_size",
        "model.ffn_hidden_size",
        "model.num_attention_heads",
        "model.num_query_groups",
        "model.kv_channels",
        "model.window_size",
        "model.rotary_base",
        "model.vocab_size",
        "model.layernorm_epsilon",
        "model.d_state",
        "model.d_conv",
        "model.expand",
        "model.dt_rank",
        "model.dt_min",
        "model.dt_max",
        "model.dt_init_floor",
        "model.embedding_init_std",
        "precision.fp8_amax_history_len",
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "parallel.virtual_pipeline_model_parallel_size",
        "parallel.context_parallel_size",
        "parallel.sequence_pieces",
        "parallel.ddp_bucket_size",
        "parallel.recompute_num_layers",
        "parallel.distributed_timeout_minutes",
        "data.sequence_length",
        "optimizer.lr",
        "optimizer.adam_eps",
        "schedule.lr_decay_tokens",
        "training.train_tokens",
        "training.train_steps",
        "training.micro_batch_size",
        "training.global_batch_size",
        "training.rampup_start_batch_size",
        "training.rampup_batch_size_increment",
        "training.rampup_tokens",
        "training.exit_duration_minutes",
        "training.exit_step",
        "validation.eval_interval",
        "validation.eval_tokens",
        "checkpoint.save_interval",
        "checkpoint.milestone_interval",
        "faults.hang_timeout_minutes",
        "faults.spike_window",
        "faults.spike_zscore",
        "faults.max_skips_in_row",
        "logging.log_interval",
        "logging.straggler_interval",
        "logging.log_layer_norms_interval",
        "logging.log_fp8_health_interval",
        "logging.profile_step_start",
        "logging.profile_step_end",
    ]
)
"""Numbers that must be over 0."""

NON_NEGATIVE = frozenset(
    [
        "data.num_workers",
        "optimizer.min_lr",
        "optimizer.weight_decay",
        "optimizer.clip_grad",
        "schedule.lr_warmup_tokens",
        "schedule.lr_warmup_steps",
        "training.seed",
        "training.gc_interval",
        "checkpoint.keep_last",
        "faults.max_skipped_steps",
        "faults.max_rollbacks",
    ]
)
"""Numbers that must not be below 0."""

BELOW_ONE = frozenset(
    ["optimizer.adam_beta1", "optimizer.adam_beta2", "schedule.lr_warmup_fraction"]
)
"""Numbers from 0 to under 1."""

UP_TO_ONE = frozenset(["schedule.lr_wsd_decay_fraction"])
"""Numbers over 0 and at most 1."""


def bounds(situation: Situation) -> Iterator[str]:
    """Every number is in its range."""
    for name, value in flatten(situation.config).items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        least = "1 or more" if isinstance(value, int) else "more than 0"
        if name in POSITIVE and value <= 0:
            yield f"{name} is {value}: it must be {least}"
        elif name in NON_NEGATIVE and value < 0:
            yield f"{name} is {value}: it must be 0 or more"
        elif name in BELOW_ONE and not 0 <= value < 1:
            yield f"{name} is {value}: it must be at least 0 and less than 1"
        elif name in UP_TO_ONE and not 0 < value <= 1:
            yield f"{name} is {value}: it must be more than 0 and at most 1"


def pattern(situation: Situation) -> Iterator[str]:
    """The layer pattern can be read."""
    try:
        expand_pattern(situation.config.model.hybrid_layer_pattern)
    except UserError as error:
        yield str(error)
