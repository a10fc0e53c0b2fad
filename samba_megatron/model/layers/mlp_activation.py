"""The MLPs' activation as a module, where megatron's MLP asks for one."""

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.swiglu import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) · up on what the MLP's first linear gives."""

    config: SambaTransformerConfig

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2F/tp] → [s, b, F/tp]."""
        return swiglu(x, backend=self.config.kernels.swiglu)
