"""The SwiGLU MLP layer (``-``): x + down(silu(gate(norm x)) * up(norm x))."""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from samba_megatron.config import ModelConfig
from samba_megatron.model.initialization import Initializer, constant, linear_uniform
from samba_megatron.model.layers.base import (
    RecomputablePart,
    RowGroups,
    SavedActivations,
    linear_flops,
    norm_part,
)

if TYPE_CHECKING:
    from samba_megatron.model.backend import Backend


class MLPKind:
    """SwiGLU (arXiv 2002.05202) without biases, as in the Samba paper, section 2."""

    symbol = "-"
    name = "mlp"

    def parameters(self, model: ModelConfig) -> int:
        """Gate, up and down matrices, and the norm."""
        return 3 * model.hidden_size * model.ffn_hidden_size + model.hidden_size

    def unsplit_parameters(self, model: ModelConfig) -> int:
        """The norm."""
        return model.hidden_size

    def fp32_parameters(self, model: ModelConfig) -> int:
        """None."""
        return 0

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Three matrix products."""
        return 3 * linear_flops(model.hidden_size, model.ffn_hidden_size)

    def linear_flops_per_token(self, model: ModelConfig) -> float:
        """All of them."""
        return self.flops_per_token(model, 1)

    def recomputed_flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """All of them: megatron computes the whole MLP again."""
        return self.flops_per_token(model, sequence_length)

    def recomputable_parts(self, model: ModelConfig) -> dict[str, RecomputablePart]:
        """The product of gate and up, and the norm's output."""
        return norm_part(model) | {"mlp_act": RecomputablePart(moved=3 * model.ffn_hidden_size)}

    def saved_activations(
        self, model: ModelConfig, recomputed: Collection[str] = ()
    ) -> SavedActivations:
        """The norm's input and output, gate and up, and their product."""
        d, f = model.hidden_size, model.ffn_hidden_size
        whole, apart = "mlp" in recomputed, "layernorm" in recomputed
        return SavedActivations(
            stream=d,
            # A norm that stands alone gives what recomputing the whole MLP starts from.
            stream_operands=d if whole == apart else 0,
            inner=0 if whole else 2 * f,
            inner_operands=0 if whole or "mlp_act" in recomputed else f,
        )

    def initializers(self, model: ModelConfig, num_layers: int) -> dict[str, Initializer]:
        """Kaiming-uniform; the last matrix scaled by the root of the residual branches."""
        scale = 1 / math.sqrt(num_layers)
        return {
            "norm.weight": constant(1.0),
            "mlp.linear_fc1.weight": linear_uniform(model.hidden_size),
            "mlp.linear_fc2.weight": linear_uniform(model.ffn_hidden_size, scale),
        }

    def huggingface_names(self, model: ModelConfig) -> dict[str, str | RowGroups]:
        """megatron joins gate and up in one matrix."""
        width = model.ffn_hidden_size
        return {
            "pre_mlp_layernorm.weight": "mlp_norm.weight",
            "mlp.linear_fc1.weight": RowGroups(
                {"mlp.gate_proj.weight": width, "mlp.up_proj.weight": width}
            ),
            "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        }

    def spec(self, backend: "Backend") -> Any:
        """megatron's MLPLayer; a fused norm is saved under the unfused one's key."""
        from functools import partial

        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.ssm.mlp_layer import MLPLayer
        from megatron.core.transformer.mlp import MLP, MLPSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

        from samba_megatron.model.layers.mlp_activation import SwiGLU

        return ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=backend.layer_norm,
                mlp=partial(
                    MLP.as_mlp_submodule,
                    submodules=MLPSubmodules(
                        linear_fc1=backend.norm_column_linear,
                        linear_fc2=backend.row_linear,
                        activation_func=SwiGLU,
                    ),
                ),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=backend.fused_norm_keys(
                    "mlp.linear_fc1", "pre_mlp_layernorm"
                ),
            ),
        )
