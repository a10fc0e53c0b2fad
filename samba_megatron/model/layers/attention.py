"""The attention layers: in the window (``*``) and without one (``F``).

The modules of the local backend and the short convolution are in
:mod:`samba_megatron.model.layers.attention_modules`.
"""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from samba_megatron.config import ModelConfig
from samba_megatron.model.initialization import Initializer, constant, linear_uniform, uniform
from samba_megatron.model.layers.base import (
    RecomputablePart,
    RowGroups,
    SavedActivations,
    linear_flops,
    norm_part,
)
from samba_megatron.ops.cost import attended_pairs, attention_flops, conv_flops

if TYPE_CHECKING:
    from samba_megatron.model.backend import Backend


class WindowedAttentionKind:
    """Causal grouped-query attention in a sliding window (Samba, section 2)."""

    symbol = "*"
    name = "attention"

    def window(self, model: ModelConfig) -> int | None:
        """Keys a query sees, itself included; None: all."""
        return model.window_size

    def parameters(self, model: ModelConfig) -> int:
        """Query, key, value and output matrices, the short convolutions, and the norm."""
        d = model.hidden_size
        heads, groups = model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
        taps = (heads + 2 * groups) * model.d_conv if model.short_convolution else 0
        return 2 * d * heads + 2 * d * groups + taps + d

    def unsplit_parameters(self, model: ModelConfig) -> int:
        """The norm."""
        return model.hidden_size

    def fp32_parameters(self, model: ModelConfig) -> int:
        """None."""
        return 0

    def flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Projections, and scores and values over the keys that a query sees on average."""
        heads, groups = model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
        taps = conv_flops(1, heads + 2 * groups, model.d_conv) if model.short_convolution else 0
        core = self.recomputed_flops_per_token(model, sequence_length)
        return self.linear_flops_per_token(model) + taps + core

    def linear_flops_per_token(self, model: ModelConfig) -> float:
        """The projections."""
        d = model.hidden_size
        heads, groups = model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
        return linear_flops(d, heads + 2 * groups) + linear_flops(heads, d)

    def recomputed_flops_per_token(self, model: ModelConfig, sequence_length: int) -> float:
        """Scores and values: megatron computes attention without its projections again."""
        pairs = attended_pairs(sequence_length, self.window(model))
        heads = model.num_attention_heads
        return attention_flops(1, heads, model.head_dim, 1) * pairs / sequence_length

    def recomputable_parts(self, model: ModelConfig) -> dict[str, RecomputablePart]:
        """The norm's output."""
        return norm_part(model)

    def saved_activations(
        self, model: ModelConfig, recomputed: Collection[str] = ()
    ) -> SavedActivations:
        """The norm's input and output; queries, keys and values; the attention's output."""
        d = model.hidden_size
        heads, groups = model.num_attention_heads * model.head_dim, model.kv_heads * model.head_dim
        inner = (heads + 2 * groups) * (2 if model.short_convolution else 1)
        norm = 0 if "layernorm" in recomputed else d
        return SavedActivations(d, norm, inner=inner, inner_operands=heads)

    def initializers(self, model: ModelConfig, num_layers: int) -> dict[str, Initializer]:
        """Kaiming-uniform; the output matrix scaled by the root of the residual branches."""
        scale = 1 / math.sqrt(num_layers)
        taps = uniform(1 / math.sqrt(model.d_conv))
        return {
            "norm.weight": constant(1.0),
            "self_attention.linear_qkv.weight": linear_uniform(model.hidden_size),
            "self_attention.linear_proj.weight": linear_uniform(
                model.num_attention_heads * model.head_dim, scale
            ),
            **{f"self_attention.{n}_conv1d.weight": taps for n in ("q", "k", "v")},
        }

    def huggingface_names(self, model: ModelConfig) -> dict[str, str | RowGroups]:
        """megatron's matrix holds, for each key/value head, its queries' rows, its key's and its
        value's."""
        head, groups = model.head_dim, model.kv_heads
        queries = model.num_attention_heads // groups * head
        rows = {"q": queries, "k": head, "v": head}
        taps = [f"{n}_conv1d.weight" for n in rows] if model.short_convolution else []
        return {
            "input_layernorm.weight": "mixer_norm.weight",
            "self_attention.linear_qkv.weight": RowGroups(
                {f"mixer.{n}_proj.weight": count for n, count in rows.items()}, groups
            ),
            "self_attention.linear_proj.weight": "mixer.o_proj.weight",
            **{f"self_attention.{name}": f"mixer.{name}" for name in taps},
        }

    def spec(self, backend: "Backend") -> Any:
        """megatron's TransformerLayer without an MLP, as its hybrid models have it."""
        from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
        from megatron.core.transformer.attention import SelfAttentionSubmodules
        from megatron.core.transformer.enums import AttnMaskType
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_layer import (
            TransformerLayer,
            TransformerLayerSubmodules,
        )

        from samba_megatron.model.layers.attention_modules import SambaSelfAttention

        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=backend.layer_norm,
                self_attention=ModuleSpec(
                    module=SambaSelfAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=backend.norm_column_linear,
                        core_attention=backend.core_attention,
                        linear_proj=backend.row_linear,
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=backend.fused_norm_keys(
                    "self_attention.linear_qkv", "input_layernorm"
                ),
            ),
        )


class FullAttentionKind(WindowedAttentionKind):
    """Causal attention over the whole sequence (Llama-2 baselines, chosen blocks of ablations).

    Megatron has one attention letter: the window of each layer is set in the config."""

    symbol = "F"
    name = "full attention"

    def window(self, model: ModelConfig) -> int | None:
        """All keys."""
        return None
