"""Attention modules: megatron's self-attention with a short convolution, and its two cores.

A core is the softmax attention of given q, k and v: Transformer Engine's, or one of this project's
kernels. Where documents stay apart or several ranks share a sequence, both are this project's:
Transformer Engine knows documents only in a layout of its own, without a batch, and cuts a sequence
into pieces in an order of its own.
"""

from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from samba_megatron.model.layers.along_sequence import attend, convolve
from samba_megatron.model.layers.mamba_mixer import ShardedParameters
from samba_megatron.model.rotary import splits_and_rotates
from samba_megatron.model.sequence import SequenceParams, sequence_params
from samba_megatron.model.transformer_config import SambaTransformerConfig
from samba_megatron.ops.rotary import split_and_rotate
from samba_megatron.ops.windowed_attention.packing import in_rows


class SambaSelfAttention(SelfAttention):
    """megatron's self-attention, optionally with a depthwise causal convolution on q, k and v.

    The convolution (``model.short_convolution``) is the Samba paper's variant for recall
    (section 3.4, phonebook): ``d_conv`` taps and SiLU, no bias, before the rotary embedding.
    Channels follow the heads, so tensor parallelism needs no communication for it.

    ``kernels.rotary`` triton or torch: megatron hands the joined projection over unsplit, and one
    kernel splits it and turns queries and keys, which megatron then is not told to turn. With a
    short convolution, an inference context, or ranks that share a key/value head, megatron does
    both in turn, whatever is chosen.
    """

    config: SambaTransformerConfig

    def __init__(self, config: SambaTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._angles: Tensor | None = None
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

    def forward(
        self,
        *args: Any,
        rotary_pos_emb: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron's, which does not hand ``packed_seq_params`` and the angles to where q, k and
        v are made."""
        self._sequence: SequenceParams | None = sequence_params(packed_seq_params)
        if isinstance(rotary_pos_emb, Tensor) and self._rotates(**kwargs):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        kwargs |= {"rotary_pos_emb": rotary_pos_emb, "packed_seq_params": packed_seq_params}
        try:
            return super().forward(*args, **kwargs)
        finally:
            # The first may hold what a piece of a sequence has left.
            self._sequence = self._angles = None

    def _rotates(
        self, inference_context: Any = None, inference_params: Any = None, **kwargs: Any
    ) -> bool:
        """Whether q and k of this call are turned here."""
        config = self.config
        if inference_context is not None or inference_params is not None:
            return False
        if config.no_rope_freq and config.no_rope_freq[self.layer_number - 1]:
            return False
        return splits_and_rotates(config.model, config.kernels, self.world_size)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """q [s, b, heads/tp, hd], k and v [s, b, groups/tp, hd]."""
        if self._angles is not None:
            return self._split_and_rotate(self._angles, *args, **kwargs)
        if not self.config.model.short_convolution:
            return super().get_query_key_value_tensors(*args, **kwargs)
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)[:3]
        return self._convolve(query, "q"), self._convolve(key, "k"), self._convolve(value, "v")

    def _split_and_rotate(self, angles: Tensor, *args: Any, **kwargs: Any) -> Any:
        qkv, _ = super().get_query_key_value_tensors(*args, **kwargs | {"split_qkv": False})
        return split_and_rotate(
            qkv,
            angles,
            self.num_attention_heads_per_partition,
            self.num_query_groups_per_partition,
            self.config.kernels.rotary,
        )

    def _convolve(self, x: Tensor, name: str) -> Tensor:
        taps = getattr(self, f"{name}_conv1d").weight
        assert self._sequence is not None, "only forward asks for q, k and v"
        flat = convolve(
            x.flatten(2),
            taps,
            None,
            self._sequence,
            self.pg_collection.cp,
            f"layer {self.layer_number} {name}_conv1d",
            self.config.kernels.causal_conv1d,
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
        self.layer_number = layer_number
        self.window = layer_window(config, layer_number)
        assert pg_collection is not None, "the core attention needs its process groups"
        self.cp_group = pg_collection.cp

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
        sequence = sequence_params(packed_seq_params)
        y = attend(
            query,
            key,
            value,
            sequence,
            self.cp_group,
            f"layer {self.layer_number} attention",
            self.window,
            self.softmax_scale,
            self.config.kernels.windowed_attention,
        )
        return in_rows(y)


def layer_window(config: SambaTransformerConfig, layer_number: int) -> int | None:
    """Keys that a query of this layer sees, itself included; None: all before it."""
    in_window = is_layer_window_attention(
        config.window_size, config.window_attn_skip_freq, layer_number
    )
    return config.model.window_size if in_window else None
