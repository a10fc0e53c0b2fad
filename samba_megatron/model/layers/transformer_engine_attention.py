"""Transformer Engine's core attention, and this project's where documents stay apart.

A file of its own because importing it needs Transformer Engine.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from samba_megatron.model.layers.along_sequence import attend
from samba_megatron.model.layers.attention_modules import layer_window
from samba_megatron.model.sequence import sequence_params
from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.windowed_attention.packing import in_rows


class TransformerEngineCoreAttention(TEDotProductAttention):
    """megatron's wrapper of Transformer Engine's attention.

    Transformer Engine is asked only where a sequence is one document: with several it would have to
    be told of them in its packed format, and what it is not told of would see everything.
    """

    config: SambaTransformerConfig

    def __init__(self, config: SambaTransformerConfig, layer_number: int, **kwargs: Any) -> None:
        super().__init__(config, layer_number, **kwargs)
        self.layer_number = layer_number
        self.window = layer_window(config, layer_number)
        self.scale = kwargs.get("softmax_scale")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """q [s, b, heads, hd], k and v [s, b, groups, hd] → [s, b, heads * hd]."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        sequence = sequence_params(packed_seq_params)
        y = attend(
            query,
            key,
            value,
            sequence,
            None,
            f"layer {self.layer_number} attention",
            self.window,
            self.scale,
            self.config.kernels.windowed_attention,
        )
        return in_rows(y)
