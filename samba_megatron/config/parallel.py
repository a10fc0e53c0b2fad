"""How the model and the batch are laid over devices, and what is recomputed to save memory."""

from dataclasses import dataclass, field
from typing import Literal

RecomputeModule = Literal[
    "mamba", "attention", "mlp", "mlp_act", "conv1d", "dt_proj", "layernorm", "scan"
]
RECOMPUTABLE_PARTS = {
    "mlp_act": "-",
    "conv1d": "M",
    "dt_proj": "M",
    "layernorm": "M*F-",
    "scan": "M",
}
"""Results that cost little to compute again, by name; the layers that have one."""


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
    ``selective`` what ``recompute_modules`` names."""

    recompute_method: Literal["uniform", "block"] = "uniform"
    """``full``: checkpoint every ``recompute_num_layers`` layers, or only the first that many."""

    recompute_num_layers: int = 1
    """Layers a checkpoint (``uniform``) or layers to recompute a stage (``block``)."""

    recompute_modules: list[RecomputeModule] = field(default_factory=lambda: ["mamba"])
    """``selective``: layer kinds to recompute, each alone (``mamba``, ``attention``, ``mlp``), and
    results within layers that cost little to compute again: the MLPs' activation (``mlp_act``),
    Mamba's convolution (``conv1d``), step sizes (``dt_proj``) and scan (``scan``), the layers'
    norms (``layernorm``)."""

    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer ends the run."""

    @property
    def recomputed_parts(self) -> tuple[str, ...]:
        """Of ``recompute_modules``, the results within layers; none where that does not hold."""
        if self.recompute_granularity != "selective":
            return ()
        return tuple(name for name in self.recompute_modules if name in RECOMPUTABLE_PARTS)

    @property
    def recomputes_layers(self) -> bool:
        """Whether whole layers are computed again, or the inside of all of a kind."""
        if self.recompute_granularity == "selective":
            return len(self.recomputed_parts) < len(self.recompute_modules)
        return self.recompute_granularity is not None
