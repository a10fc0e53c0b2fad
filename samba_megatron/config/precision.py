"""Number formats of parameters, gradients and matrix products."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class PrecisionConfig:
    """bf16 with fp32 main parameters and gradient reduction is the default on a GPU."""

    params_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Parameters and activations; ``auto`` is bf16 on a GPU and fp32 on a CPU."""

    fp8: Literal["hybrid", "e4m3"] | None = None
    """FP8 matrix products in the Transformer Engine linears: ``hybrid`` is E4M3 forward and E5M2
    backward. Needs a GPU with FP8 units."""

    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scaling factors are found; ``mxfp8`` needs Blackwell."""

    fp8_amax_history_len: int = 16
    """Steps of maxima that delayed scaling remembers; with 1024, Mamba's outliers of long ago still
    press the present numbers towards zero (docs/performance.md, FP8 and the loss)."""

    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """How delayed scaling uses them."""

    fp8_param_gather: bool = False
    """Keep the weights of these linears in FP8, cast from fp32 main parameters after each update:
    data-parallel ranks gather a byte a number instead of two. Checkpoints do not change."""

    accumulate_allreduce_grads_in_fp32: bool = True
    """Gradients are accumulated and reduced over data-parallel ranks in fp32."""

    fp32_residual_connection: bool = False
    """Keep the residual stream in fp32, as the Samba authors' code does; costs memory."""
