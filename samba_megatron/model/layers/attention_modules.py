"""Attention modules: megatron's self-attention with a short convolution, and the local core."""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from samba_megatron.model.layers.mamba_mixer import ShardedParameters
from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.windowed_attention import windowed_attention


class SambaSelfAttention(SelfAttention):
    """megatron's self-attention, optionally with a depthwise causal convolution on q, k and v.

    The convolution (``model.short_convolution``) is the Samba paper's variant for recall
    (section 3.4, phonebook): ``d_conv`` taps and SiLU, no bias, before the rotary embedding.
    Channels follow the heads, so it needs no communication.
    """

    config: SambaTransformerConfig

    def __init__(self, config: SambaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if not config.model.short_convolution:
            return
        heads = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        groups = self.num_query_groups_per_partition * self.hidden_size_per_attention_head
        for name, channels in (("q", heads), ("k", groups), ("v", groups)):
            shape = (channels, 1, config.model.d_conv)
            taps = ShardedParameters(
                config, self.pg_collection.tp, {"weight": (shape, 0, config.params_dtype)}
            )
            self.add_module(f"{name}_conv1d", taps)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """q [s, b, heads/tp, hd], k and v [s, b, groups/tp, hd]."""
        if not self.config.model.short_convolution:
            return super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)[:3]
        return self._convolve(query, "q"), self._convolve(key, "k"), self._convolve(value, "v")

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        taps = getattr(self, f"{name}_conv1d").weight
        flat = causal_conv1d(
            x.flatten(2),
            taps,
            None,
            backend=self.config.kernels.causal_conv1d,
        )
        return flat.view(x.shape)


class LocalCoreAttention(MegatronModule):
    """Causal attention in the layer's window, in plain torch (or flash-attn when present).

    Stands where Transformer Engine's DotProductAttention stands on a GPU; unlike megatron's own
    DotProductAttention it never builds the [s, s] scores of a windowed layer.
    """

    config: SambaTransformerConfig

    def __init__(
        self,
        config: SambaTransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        in_window = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.model.window_size if in_window else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """q [s, b, heads, hd], k and v [s, b, groups, hd] → [s, b, heads * hd]."""
        if packed_seq_params is not None:
            raise NotImplementedError("the local attention takes no packed sequences")
        return windowed_attention(
            query,
            key,
            value,
            window=self.window,
            scale=self.softmax_scale,
            backend=self.config.kernels.windowed_attention,
        )
