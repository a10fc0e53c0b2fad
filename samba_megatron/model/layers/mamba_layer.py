"""megatron's Mamba layer, whose norm may give the residual stream too."""

from typing import Any

from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from samba_megatron.model.layers.norm import RMSNormWithResidual


class SambaMambaLayer(MambaLayer):
    """x + mixer(norm(x)), as megatron's own, which unlike its transformer layer takes no pairs."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[s, b, d] → [s, b, d]; under sequence parallelism a rank's part of s."""
        if not isinstance(self.norm, RMSNormWithResidual):
            return super().forward(hidden_states, *args, **kwargs)
        normalised, residual = self.norm(hidden_states)
        mixed = self.mixer(normalised, packed_seq_params=kwargs.get("packed_seq_params"))
        add = self.mamba_bda(training=self.training, fused=self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return add(mixed, residual, self.hidden_dropout)
