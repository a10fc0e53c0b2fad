"""Our variants of megatron's hybrid host classes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from samba_megatron.config.pattern import layer_symbols
from samba_megatron.model.backend import Backend
from samba_megatron.model.head import ChunkedHead, Losses
from samba_megatron.model.layers import KINDS
from samba_megatron.model.rotary import ShardedRotaryEmbedding
from samba_megatron.model.sequence import sequence_params
from samba_megatron.model.transformer_config import SambaTransformerConfig


def stack_submodules(backend: Backend) -> HybridStackSubmodules:
    """The specs of all layer kinds over one backend, as megatron's hybrid stack takes them."""
    return HybridStackSubmodules(
        mamba_layer=KINDS["M"].spec(backend),
        attention_layer=KINDS["*"].spec(backend),
        mlp_layer=KINDS["-"].spec(backend),
    )


class SambaStack(HybridStack):
    """megatron's stack with the backend's final norm (megatron's own demands Transformer Engine).

    The arguments are HybridStack's; ``final_norm`` is the norm's class.
    """

    def __init__(self, *args: Any, final_norm: Any, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = final_norm(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )


class SambaModel(HybridModel):
    """megatron's hybrid language model; knows the letters of all its layers."""

    config: SambaTransformerConfig
    post_process: bool
    output_layer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.position_embedding_type == "rope":
            self.rotary_pos_emb = ShardedRotaryEmbedding(
                self.config.kv_channels,
                rotary_percent=1.0,
                rotary_base=self.config.model.rotary_base,
                use_cpu_initialization=self.config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
        if self.post_process and self.config.kernels.cross_entropy == "chunked":
            self.output_layer = ChunkedHead(self.output_layer, self.config)

    def forward(
        self,
        *args: Any,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Losses:
        """As megatron's; a piece of a sequence is turned by its positions in the whole one, and a
        head that has the loss in it is given what that needs."""
        if self.position_embedding_type == "rope":
            sequence = sequence_params(packed_seq_params)
            past, self.rotary_pos_emb.sequences = sequence.past, sequence.sequences
            self.rotary_pos_emb.start = past.start if past is not None else 0
        kwargs["packed_seq_params"] = packed_seq_params
        chunked = self.post_process and isinstance(self.output_layer, ChunkedHead)
        if labels is None or not chunked:
            return super().forward(*args, labels=labels, loss_mask=loss_mask, **kwargs)
        with self.without_head():
            hidden = super().forward(*args, **kwargs)
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else None
        return self.output_layer(hidden, weight, labels=labels, loss_mask=loss_mask)

    @contextmanager
    def without_head(self) -> Iterator[None]:
        """Inside, the model ends at its last hidden states: no logits are made."""
        before, self.post_process = self.post_process, False
        try:
            yield
        finally:
            self.post_process = before

    @property
    def layer_symbols(self) -> str:
        """Letters of the whole model's layers, in order."""
        return layer_symbols(self.config.model.hybrid_layer_pattern)
