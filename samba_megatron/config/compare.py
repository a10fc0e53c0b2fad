"""What may change between a checkpoint and the run that goes on from it.

A resumed run must be the run that was stopped: the network, the data and the optimizer's
mathematics stay. Where and how it computes is free, and what a person may well steer during a run
(learning rate, length, batch size) changes with a notice. One table decides, field by field.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

from samba_megatron.config.fields import flatten, run_fields, run_groups
from samba_megatron.config.load import from_dict
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.config.run import RunConfig
from samba_megatron.config.units import format_tokens
from samba_megatron.platform.errors import UserError


class Change(Enum):
    """What a different value of a field means for a checkpoint."""

    FREE = "may differ, nothing is said"
    NOTICE = "may differ, and is reported"
    FIXED = "a run cannot go on with another value, though the weights fit"
    SHAPE = "the weights do not fit"


_FREE, _NOTICE, _FIXED, _SHAPE = Change.FREE, Change.NOTICE, Change.FIXED, Change.SHAPE

CHANGES: Mapping[str, Change] = {
    "name": _FREE,
    "run_dir": _FREE,
    "model.hybrid_layer_pattern": _SHAPE,  # without its cuts, which belong to the layout
    "model.hidden_size": _SHAPE,
    "model.ffn_hidden_size": _SHAPE,
    "model.num_attention_heads": _SHAPE,
    "model.num_query_groups": _SHAPE,
    "model.kv_channels": _SHAPE,
    "model.window_size": _FIXED,
    "model.position_embedding_type": _FIXED,
    "model.rotary_base": _FIXED,
    "model.short_convolution": _SHAPE,
    "model.vocab_size": _SHAPE,
    "model.share_embeddings_and_output_weights": _SHAPE,
    "model.layernorm_epsilon": _FIXED,
    "model.d_state": _SHAPE,
    "model.d_conv": _SHAPE,
    "model.expand": _SHAPE,
    "model.dt_rank": _SHAPE,
    # Initial values: a checkpoint has the weights already.
    "model.dt_min": _FREE,
    "model.dt_max": _FREE,
    "model.dt_init_floor": _FREE,
    "model.embedding_init_std": _FREE,
    "precision.params_dtype": _NOTICE,
    "precision.fp8": _NOTICE,
    "precision.fp8_recipe": _NOTICE,
    "precision.fp8_amax_history_len": _NOTICE,
    "precision.fp8_amax_compute_algo": _NOTICE,
    "precision.fp8_param_gather": _FREE,
    "precision.accumulate_allreduce_grads_in_fp32": _NOTICE,
    "precision.fp32_residual_connection": _NOTICE,
    "parallel.tensor_model_parallel_size": _FREE,
    "parallel.sequence_parallel": _FREE,
    "parallel.pipeline_model_parallel_size": _FREE,
    "parallel.virtual_pipeline_model_parallel_size": _FREE,
    "parallel.context_parallel_size": _FREE,
    "parallel.overlap_grad_reduce": _FREE,
    "parallel.overlap_param_gather": _FREE,
    "parallel.ddp_bucket_size": _FREE,
    "parallel.sequence_pieces": _NOTICE,  # where gradients are truncated
    "parallel.sequence_piece_gradients": _NOTICE,
    "parallel.recompute_granularity": _FREE,
    "parallel.recompute_method": _FREE,
    "parallel.recompute_num_layers": _FREE,
    "parallel.recompute_modules": _FREE,
    "parallel.distributed_timeout_minutes": _FREE,
    "kernels.transformer_impl": _FREE,
    "kernels.selective_scan": _FREE,
    "kernels.causal_conv1d": _FREE,
    "kernels.windowed_attention": _FREE,
    "kernels.swiglu": _FREE,
    "kernels.rms_norm": _FREE,
    "kernels.rotary": _FREE,
    "kernels.gradient_accumulation_fusion": _FREE,
    "kernels.cuda_graph_impl": _FREE,
    "kernels.cross_entropy": _FREE,
    # The datasets themselves are compared, not what they are called (data.identity).
    "data.data_path": _FREE,
    "data.blend_file": _FREE,
    "data.valid_data_path": _NOTICE,
    "data.split": _FIXED,  # where it is used: without valid_data_path
    "data.path_to_cache": _FREE,
    "data.tokenizer": _NOTICE,
    "data.sequence_length": _FIXED,
    "data.packing": _FIXED,  # positions in the sources are counted in its samples
    "data.reset_at_document_boundaries": _FIXED,
    "data.eod_mask_loss": _FIXED,
    "data.loss_masks": _FIXED,
    "data.num_workers": _FREE,
    "optimizer.adam_impl": _FREE,
    "optimizer.lr": _NOTICE,
    "optimizer.min_lr": _NOTICE,
    "optimizer.weight_decay": _NOTICE,
    "optimizer.weight_decay_exempt": _FIXED,  # the optimizer's parameter groups
    "optimizer.adam_beta1": _FIXED,
    "optimizer.adam_beta2": _FIXED,
    "optimizer.adam_eps": _FIXED,
    "optimizer.clip_grad": _NOTICE,
    "schedule.lr_decay_style": _NOTICE,
    "schedule.lr_warmup_fraction": _NOTICE,
    "schedule.lr_warmup_tokens": _NOTICE,
    "schedule.lr_warmup_steps": _NOTICE,
    "schedule.lr_decay_tokens": _NOTICE,
    "schedule.lr_wsd_decay_fraction": _NOTICE,
    "schedule.lr_wsd_decay_style": _NOTICE,
    "training.train_tokens": _NOTICE,
    "training.train_steps": _NOTICE,
    "training.micro_batch_size": _FREE,
    "training.global_batch_size": _NOTICE,
    "training.rampup_start_batch_size": _NOTICE,
    "training.rampup_batch_size_increment": _NOTICE,
    "training.rampup_tokens": _NOTICE,
    "training.seed": _FIXED,
    "training.exit_duration_minutes": _FREE,
    "training.exit_signals": _FREE,
    "training.exit_step": _FREE,
    "training.rerun_mode": _FREE,
    "training.gc_interval": _FREE,
    "training.deterministic": _FREE,
    "validation.eval_interval": _FREE,
    "validation.eval_at_start": _FREE,
    "validation.eval_at_end": _FREE,
    "validation.sequence_lengths": _FREE,
    "validation.eval_tokens": _FREE,
    "checkpoint.save": _FREE,
    "checkpoint.load": _FREE,
    "checkpoint.load_weights_only": _FREE,
    "checkpoint.save_interval": _FREE,
    "checkpoint.save_at_end": _FREE,
    "checkpoint.async_save": _FREE,
    "checkpoint.keep_last": _FREE,
    "checkpoint.milestone_interval": _FREE,
    "checkpoint.fully_parallel_save": _FREE,
    "checkpoint.fully_parallel_load": _FREE,
    "checkpoint.verify_on_load": _FREE,
    "checkpoint.fall_back": _FREE,
    "faults.watchdog": _FREE,
    "faults.hang_timeout_minutes": _FREE,
    "faults.skip_spikes": _NOTICE,
    "faults.spike_window": _NOTICE,
    "faults.spike_zscore": _NOTICE,
    "faults.max_skips_in_row": _NOTICE,
    "faults.max_skipped_steps": _FREE,
    "faults.max_rollbacks": _FREE,
    "logging.log_interval": _FREE,
    "logging.straggler_interval": _FREE,
    "logging.log_layer_norms_interval": _FREE,
    "logging.log_fp8_health_interval": _FREE,
    "logging.progress": _FREE,
    "logging.mlflow_tracking_uri": _FREE,
    "logging.mlflow_experiment": _FREE,
    "logging.profile_step_start": _FREE,
    "logging.profile_step_end": _FREE,
    "logging.profile_ranks": _FREE,
    "logging.profile_shapes": _FREE,
}
"""Every field of the configuration, and what it means that it changed."""


_BEFORE: Mapping[str, Any] = {"data.reset_at_document_boundaries": False}
"""What runs did before a field was there, where that is not its default."""


class _Difference(NamedTuple):
    name: str
    change: Change
    sentence: str


def compare_for_resume(
    saved: Mapping[str, Any], current: RunConfig, weights_only: bool = False
) -> list[str]:
    """Whether a run may go on from a checkpoint.

    Args:
        saved: the configuration in the checkpoint, as :func:`~samba_megatron.config.load.to_dict`
            gave it; a field that it lacks is taken to have been what runs did before it was there.
        current: the run that is starting.
        weights_only: only the weights are taken from the checkpoint, so only they must fit.

    Returns:
        Notices of what changed and takes effect.

    Raises:
        UserError: what changed and must not, with saved and current values and the remedy.
    """
    before, notices = _read_saved(saved)
    forbidden = (Change.SHAPE,) if weights_only else (Change.SHAPE, Change.FIXED)
    refused = []
    for difference in _differences(before, current):
        if difference.change in forbidden:
            refused.append(difference)
        elif not weights_only or difference.name.startswith("model."):
            notices.append(f"{difference.sentence} from here on")
    if refused:
        raise UserError(_refusal(refused, weights_only))
    return notices


def _refusal(refused: list[_Difference], weights_only: bool) -> str:
    changed = "; ".join(difference.sentence for difference in refused)
    if any(difference.change is Change.SHAPE for difference in refused):
        what = "the checkpoint's weights do not fit this model"
        remedy = "give the saved values"
        remedy += "" if weights_only else ", or start a new run in another checkpoint.save folder"
    else:
        what = "the run cannot go on from the checkpoint"
        remedy = (
            "give the saved values, or start a new run from its weights: another checkpoint.save "
            "folder, checkpoint.load with this one, and --checkpoint.load_weights_only true"
        )
    return f"{what}: {changed}; {remedy}"


def _read_saved(saved: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """The saved configuration, without what this version of the code does not know."""
    known: dict[str, Any] = {}
    notices = []
    for key, value in saved.items():
        if key in run_groups() and isinstance(value, Mapping):
            known[key] = {k: v for k, v in value.items() if f"{key}.{k}" in run_fields()}
            unknown = [f"{key}.{k}" for k in value if f"{key}.{k}" not in run_fields()]
        elif key in run_fields():
            known[key] = value
            continue
        else:
            unknown = [key]
        notices += [f"{name} in the checkpoint is not known here: ignored" for name in unknown]
    for name, value in _BEFORE.items():
        group, field = name.split(".")
        known.setdefault(group, {}).setdefault(field, value)
    return from_dict(known, "in the checkpoint's configuration"), notices


def _differences(before: RunConfig, after: RunConfig) -> list[_Difference]:
    saved_values, current_values = flatten(before), flatten(after)
    found = []
    for name, change in CHANGES.items():
        saved, current = _meaning(name, before), _meaning(name, after)
        if saved == current:
            continue
        if name == "model.hybrid_layer_pattern" and saved.replace("F", "*") == current.replace(
            "F", "*"
        ):
            change = Change.FIXED  # a window more or less leaves the weights as they are
        if change is not Change.FREE:
            was, now = (_show(name, saved_values[name]), _show(name, current_values[name]))
            if was == now:
                was, now = str(saved), str(current)
            found.append(_Difference(name, change, f"{name} was {was} and is {now}"))
    return found


def _meaning(name: str, config: RunConfig) -> Any:
    """What a field comes to: equal for two ways of writing the same thing."""
    model, data = config.model, config.data
    match name:
        case "model.hybrid_layer_pattern":
            return layer_symbols(model.hybrid_layer_pattern)
        case "model.num_query_groups":
            return model.kv_heads
        case "model.kv_channels":
            return model.head_dim
        case "model.dt_rank":
            return model.resolved_dt_rank
        case "data.split":
            return "unused (data.valid_data_path is given)" if data.valid_data_path else data.split
        case "parallel.sequence_pieces":
            truncated = config.parallel.sequence_piece_gradients == "truncated"
            return config.parallel.sequence_pieces if truncated else 1
        case "optimizer.weight_decay_exempt":
            return sorted(set(config.optimizer.weight_decay_exempt))
        case _:
            return flatten(config)[name]


def _show(name: str, value: Any) -> str:
    if value is None:
        return "unset"
    if run_fields()[name].is_tokens:
        return format_tokens(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
