"""megatron's data-parallel wrapper, and the hooks between it and the pipeline schedules."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.utils import get_model_config

from samba_megatron.config import ParallelConfig, PrecisionConfig

if TYPE_CHECKING:
    from torch import nn


def wrap(
    chunks: "Sequence[nn.Module]", parallel: ParallelConfig, precision: PrecisionConfig
) -> list[DistributedDataParallel]:
    """Wraps each model chunk: gradient buffers, their reduction, and the parameter gather."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=precision.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        bucket_size=parallel.ddp_bucket_size,
        fp8_param_gather=precision.fp8_param_gather,
    )
    wrapped = [
        DistributedDataParallel(
            config=get_model_config(chunk),
            ddp_config=ddp_config,
            module=chunk,
            # Buckets are for overlap; the later chunks of an interleaved stage have little left
            # to overlap with.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    # Weights in FP8 are made the same on all ranks when they are cast (:func:`cast_from_main`).
    for chunk in [] if precision.fp8_param_gather else wrapped:
        chunk.broadcast_params()
    return wrapped


def fuse_gradient_accumulation(chunks: "Sequence[nn.Module]") -> None:
    """Lets Transformer Engine's linears add to the gradient buffer within the matrix product.

    megatron's switch of this name would hold for its own linears too (embedding and head), which
    need Apex for it.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def configure_schedule(chunks: "Sequence[Any]", optimizer: Any, parallel: ParallelConfig) -> None:
    """Tells the schedules when to synchronise gradients and how to finish them."""
    config = get_model_config(chunks[0])
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def release(chunks: "Sequence[Any]") -> None:
    """Undoes :func:`configure_schedule` at the end of a run, so that its memory and the threads of
    its process groups can go before the process does.

    Python's collector does not see through autograd: the config holds the optimizer, that holds
    slices of fp32 weights, they hold the accumulators of gradients, and the accumulators' hooks
    hold megatron's wrapper.
    """
    config = get_model_config(chunks[0])
    config.grad_scale_func = config.no_sync_func = config.timers = None
    for chunk in chunks:
        chunk.grad_accs.clear()


@contextmanager
def whole_parameters(chunks: "Sequence[Any]", overlap_param_gather: bool) -> Iterator[None]:
    """Inside, every rank holds all updated parameters and forward passes gather none.

    With ``overlap_param_gather`` the parameters are gathered by the forward pass after the update:
    what reads them in between (validation, a checkpoint) must ask for them.
    """
    if not overlap_param_gather:
        yield
        return
    for chunk in chunks:
        chunk.disable_forward_pre_hook(param_sync=True)
    yield
    for chunk in chunks:
        chunk.enable_forward_pre_hook()
