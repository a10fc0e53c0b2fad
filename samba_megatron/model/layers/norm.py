"""RMSNorm for the local backend, with the sequence-parallel mark that torch's own lacks."""

import torch
from megatron.core.transformer import TransformerConfig


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
