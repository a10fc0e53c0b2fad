"""How the model and the batch are laid over devices, and what is recomputed to save memory."""

from dataclasses import dataclass, field
from typing import Literal

RecomputeModule = Literal["mamba", "attention", "mlp"]


@dataclass
class ParallelConfig:
    """Tensor, sequence, pipeline and context parallelism; data parallelism takes what is left."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""

    sequence_parallel: bool = False
    """Split norms and residual along the sequence over the tensor-parallel ranks."""

    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks a pipeline stage (interleaved schedule)."""

    context_parallel_size: int = 1
    """Ranks that share each sequence, a contiguous piece each: for sequences that one device cannot
    hold."""

    sequence_pieces: int = 1
    """Pieces in which each sequence goes through the model, one after the other: a sequence of any
    length in the memory of one piece."""

    sequence_piece_gradients: Literal["exact", "truncated"] = "exact"
    """``exact``: the whole sequence's gradients, for one more forward pass; ``truncated``: none
    flow from a piece to the one before it."""

    overlap_grad_reduce: bool = True
    """Reduce gradients over data-parallel ranks while the backward pass runs."""

    overlap_param_gather: bool = True
    """Gather updated parameters while the next forward pass runs."""

    ddp_bucket_size: int | None = None
    """Parameters a gradient bucket; megatron-core's default (40M, more at scale) when unset."""

    recompute_granularity: Literal["full", "selective"] | None = None
    """``full`` recomputes whole layers in the backward pass (see ``recompute_method``),
    ``selective`` the layer kinds in ``recompute_modules``."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """``full``: checkpoint every ``recompute_num_layers`` layers, or only the first that many."""

    recompute_num_layers: int = 1
    """Layers a checkpoint (``uniform``) or layers to recompute a stage (``block``)."""

    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["mamba"])
    """``selective``: layer kinds to recompute, each alone."""

    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""
