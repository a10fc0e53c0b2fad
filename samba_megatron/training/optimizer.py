"""AdamW over megatron's distributed optimizer, and the learning-rate schedule in tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from samba_megatron.config import OptimizerConfig, RunConfig
from samba_megatron.platform.errors import UserError
from samba_megatron.training.batches import RunLength

if TYPE_CHECKING:
    import torch
    from torch import nn


def adam_implementation() -> str:
    """Whose AdamW megatron uses here: it takes Transformer Engine's, else Apex's, else torch's."""
    from megatron.core import optimizer

    module = optimizer.Adam.__module__
    if module.startswith("transformer_engine"):
        return "transformer_engine"
    return "apex" if module.startswith("apex") else "torch"


def build_optimizer(config: RunConfig, chunks: "Sequence[nn.Module]") -> Any:
    """The distributed optimizer (at any number of data-parallel ranks, also one).

    Args:
        config: the run's configuration.
        chunks: model chunks in megatron's DDP wrapper.

    Raises:
        UserError: if a demanded AdamW is not what megatron finds here.
    """
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    from samba_megatron.model.fp8_weights import cast_from_main
    from samba_megatron.model.transformer_config import params_dtype
    from samba_megatron.platform import distributed
    from samba_megatron.training import torch_adam

    wanted, ours = config.optimizer.adam_impl, config.optimizer
    if wanted == "torch":
        torch_adam.force()
    elif wanted not in ("auto", adam_implementation()):
        raise UserError(
            f"optimizer.adam_impl is {wanted}, but here megatron uses {adam_implementation()}'s "
            "AdamW: install the other, or use auto"
        )
    dtype = params_dtype(config)
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=ours.lr,
        min_lr=ours.min_lr,
        weight_decay=ours.weight_decay,
        adam_beta1=ours.adam_beta1,
        adam_beta2=ours.adam_beta2,
        adam_eps=ours.adam_eps,
        clip_grad=ours.clip_grad,
        params_dtype=dtype,
        bf16=str(dtype) == "torch.bfloat16",
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
        # It decides how weights in FP8 are cut into the ranks' parts; others do not ask.
        fp8_recipe=config.precision.fp8_recipe if config.precision.fp8_param_gather else None,
    )
    optimizer = get_megatron_optimizer(
        megatron_config,
        list(chunks),
        config_overrides=_weight_decay_overrides(ours),
        use_gloo_process_groups=distributed.device_type() == "cuda",
    )
    torch_adam.mend(optimizer)
    if config.precision.fp8_param_gather:
        cast_from_main(optimizer, chunks)
    return optimizer


def is_exempt(name: str, shape: "torch.Size | tuple[int, ...]", exempt: Sequence[str]) -> bool:
    """Whether the parameter ``name`` belongs to a kind without weight decay.

    Kinds are disjoint: the scan's step-size bias and the convolution's are ``bias``.
    """
    last = name.rsplit(".", 1)[-1]
    if last == "bias":
        return "bias" in exempt
    if "layer_norm" in last or "norm." in name:
        return "norm" in exempt
    if "conv1d" in name:
        return "conv1d" in exempt
    if "word_embeddings" in name or "output_layer" in name:
        return "embedding" in exempt
    return last in ("A_log", "D") and last in exempt


def _weight_decay_overrides(ours: OptimizerConfig) -> dict[Any, Any]:
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    exempt = tuple(ours.weight_decay_exempt)
    if not exempt:
        return {}
    predicate = ParamWithNamePredicate(
        name="weight_decay_exempt",
        fn=lambda parameter, name: is_exempt(name, parameter.shape, exempt),
    )
    return {ParamKey(with_name_predicate=predicate): {"wd_mult": 0.0}}


def build_schedule(config: RunConfig, optimizer: Any, length: RunLength) -> Any:
    """megatron's OptimizerParamScheduler, counting tokens: ``step(tokens)``.

    The configuration is the truth: on resume only the count is restored, so a changed rate or
    length takes effect (the resume check says so).
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    ours, schedule = config.optimizer, config.schedule
    decay = schedule.lr_decay_tokens or length.tokens
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=ours.lr,
        min_lr=ours.min_lr,
        lr_warmup_steps=warmup_tokens(config, length),
        lr_decay_steps=decay,
        lr_decay_style=schedule.lr_decay_style,
        start_wd=ours.weight_decay,
        end_wd=ours.weight_decay,
        wd_incr_steps=decay,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=int(decay * schedule.lr_wsd_decay_fraction),
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
    )


def warmup_tokens(config: RunConfig, length: RunLength) -> int:
    """Tokens of the linear warm-up."""
    schedule = config.schedule
    if schedule.lr_warmup_tokens is not None:
        return schedule.lr_warmup_tokens
    if schedule.lr_warmup_steps is not None:
        return schedule.lr_warmup_steps * (length.tokens // max(length.steps, 1))
    return int(schedule.lr_warmup_fraction * length.tokens)
