"""The MLPs' activation as a module, where megatron's MLP asks for one."""

from functools import partial

from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from samba_megatron.model.recomputation import recomputable
from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.swiglu import swiglu


class SwiGLU(MegatronModule):
    """silu(gate) · up on what the MLP's first linear gives."""

    config: SambaTransformerConfig

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, 2F/tp] → [s, b, F/tp]."""
        activation = partial(swiglu, backend=self.config.kernels.swiglu)
        if "mlp_act" in self.config.recompute_parts:
            return recomputable(activation, x)
        return activation(x)
