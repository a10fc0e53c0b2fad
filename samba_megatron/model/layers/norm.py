"""RMSNorms of this project: with the sequence-parallel mark that torch's own lacks, and with the
residual stream's gradient in the norm's."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension (arXiv 1910.07467), weight only.

    Args:
        config: sets dtype and sequence parallelism.
        hidden_size: normalised width.
        eps: added to the mean square.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens; the mark on
    the weight has megatron sum its gradient over those ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(
            hidden_size,
            eps=eps,
            device=torch.cuda.current_device(),
            dtype=config.params_dtype,
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RMSNormWithResidual(RMSNorm):
    """The norm before a layer; gives its input too, for the residual stream.

    Megatron's transformer layer takes such a pair from any norm, and our Mamba layer does.
    """

    def __init__(self, config: SambaTransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(config, hidden_size, eps)
        self.backend = config.kernels.rms_norm

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[s, b, d] → normalised [s, b, d], and x: to be read in x's place."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, self.backend)
