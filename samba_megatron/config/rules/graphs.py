"""Rules of a step as one CUDA graph: what can be recorded."""

from collections.abc import Iterator

from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from samba_megatron.config.rules.situation import Situation

_FIELD = "kernels.cuda_graph_impl full_iteration"


def recordable(situation: Situation) -> Iterator[str]:
    """One GPU computes whole layers of whole sequences, and Python has no part in a step."""
    config = situation.config
    if not config.kernels.uses_graph:
        return
    if situation.device_type != "cuda":
        yield f"{_FIELD} needs an NVIDIA GPU, and there is none: use none"
    parallel, logging = config.parallel, config.logging
    for name in ("tensor_model", "pipeline_model", "context"):
        field = f"{name}_parallel_size"
        if (size := getattr(parallel, field)) > 1:
            yield (
                f"{_FIELD} records what one GPU does, and parallel.{field} is {size}: use 1, or "
                "none"
            )
    if parallel.sequence_pieces > 1:
        yield (
            f"{_FIELD} records no sequences in pieces, and parallel.sequence_pieces is "
            f"{parallel.sequence_pieces}: use 1, or none"
        )
    if parallel.recomputes_layers:
        yield (
            f"{_FIELD} cannot set back random generators, as recomputing whole layers or kinds of "
            "them does: set parallel.recompute_granularity to selective and "
            f"parallel.recompute_modules to some of {', '.join(RECOMPUTABLE_PARTS)}, or use none"
        )
    delayed = config.precision.fp8 and config.precision.fp8_recipe == "delayed"
    if delayed and situation.data_parallel_size > 1:
        yield (
            f"{_FIELD} leaves communication between ranks outside the graph, and "
            "precision.fp8_recipe delayed exchanges maxima inside: use tensorwise, or none"
        )
    for field in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(parallel, field):
            yield (
                f"{_FIELD} leaves communication between ranks outside the graph, and "
                f"parallel.{field} puts it between the kernels: set it to false"
            )
    for field in ("log_layer_norms_interval", "log_fp8_health_interval"):
        if getattr(logging, field):
            yield (
                f"{_FIELD} leaves Python no part in a step, and logging.{field} watches layers "
                "from Python: unset it, or use none"
            )


RULES = (recordable,)
