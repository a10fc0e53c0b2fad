"""Which implementation computes what; ``auto`` picks the best that this machine has."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class KernelsConfig:
    """Each choice is printed at start; a forced one that cannot run is refused by name."""

    transformer_impl: Literal["auto", "transformer_engine", "local"] = "auto"
    """Linears, norms and attention: Transformer Engine, or plain torch (runs on a CPU)."""

    selective_scan: str = "auto"
    """Backend of the Mamba-1 selective scan."""

    causal_conv1d: str = "auto"
    """Backend of the depthwise causal convolution."""

    windowed_attention: str = "auto"
    """Backend of attention in the ``local`` implementation, and wherever documents stay apart."""

    swiglu: str = "auto"
    """Backend of the MLPs' gate."""

    rms_norm: Literal["auto", "transformer_engine", "triton", "torch"] = "auto"
    """The layers' norms: inside Transformer Engine's linears, or this project's, which add the
    residual stream's gradient to the norm's in one pass; ``auto`` is this project's where Triton
    can compile it, unless the residual stream is kept in fp32."""

    rotary: Literal["auto", "megatron", "triton", "torch"] = "auto"
    """The attention layers' rotary embedding: ``triton`` and ``torch`` are this project's, one with
    the split of the joined projection into queries, keys and values, in one pass each way;
    ``megatron`` is apart from it, by Transformer Engine's kernel where its layers are used. So it
    is, whatever is chosen, with a short convolution, which comes between the two, and where
    tensor-parallel ranks share a key/value head. ``auto`` is ``triton`` on a GPU."""

    gradient_accumulation_fusion: bool = True
    """Transformer Engine's linears add their weights' gradients to the gradient buffer as part of
    the matrix product, instead of making them first and adding then."""

    cuda_graph_impl: Literal["none", "full_iteration"] = "none"
    """``full_iteration`` records forward and backward of a step as one CUDA graph, and replays it:
    where micro-batches are so small that the GPU waits for Python. It takes no more time where they
    are not, but activations' memory stays taken between steps."""

    cross_entropy: Literal["auto", "megatron", "transformer_engine", "chunked"] = "auto"
    """Vocabulary-parallel cross-entropy: megatron-core's, Transformer Engine's fused one, or
    ``chunked``, which is one with the head and holds the logits of a few thousand tokens at a
    time, never of a whole micro-batch."""

    @property
    def uses_graph(self) -> bool:
        """Whether a step is recorded and replayed."""
        return self.cuda_graph_impl != "none"
