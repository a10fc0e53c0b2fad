"""What the network is: sizes, layer pattern, attention window, state space dimensions."""

from dataclasses import dataclass
from math import ceil
from typing import Literal


@dataclass
class ModelConfig:
    """The architecture (Samba, arXiv 2406.07522, section 2, and its baselines and ablations)."""

    hybrid_layer_pattern: str = "M-*- x2"
    """Layers in order: ``M`` Mamba-1, ``*`` attention in the window, ``F`` attention without a
    window, ``-`` SwiGLU MLP; each with its own norm and residual. ``xN`` repeats the group before
    it: ``M-*- x6``. ``|`` cuts pipeline stages; without cuts they are placed evenly."""

    hidden_size: int = 256
    """Width of the residual stream (d)."""

    ffn_hidden_size: int = 768
    """Width of the SwiGLU MLP (f)."""

    num_attention_heads: int = 4
    """Query heads."""

    num_query_groups: int | None = None
    """Key/value heads (grouped-query attention); all heads when unset."""

    kv_channels: int | None = None
    """Dimensions of one head; hidden_size / num_attention_heads when unset."""

    window_size: int | None = 2048
    """Keys that a query of a ``*`` layer sees, itself included; unset: no window.
    (megatron-core's ``window_size=(window_size - 1, 0)``.)"""

    position_embedding_type: Literal["rope", "none"] = "rope"
    """Rotary position embedding in the attention layers, or none (Samba-NoPE)."""

    rotary_base: int = 10000
    """Base period of the rotary embedding."""

    short_convolution: bool = False
    """A causal depthwise convolution (``d_conv`` taps, SiLU) on queries, keys and values."""

    vocab_size: int = 16384
    """Rows of the embedding: at least the tokenizer's vocabulary."""

    share_embeddings_and_output_weights: bool = True
    """One matrix for embedding and head."""

    layernorm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm."""

    d_state: int = 16
    """State dimensions a channel of the selective scan (N)."""

    d_conv: int = 4
    """Taps of the causal convolution before the scan."""

    expand: int = 2
    """Inner width of the Mamba mixer over hidden_size (E = expand * d)."""

    dt_rank: int | None = None
    """Rank of the step-size projection; ceil(hidden_size / 16) when unset."""

    dt_min: float = 1e-3
    """Smallest initial step size."""

    dt_max: float = 0.1
    """Largest initial step size."""

    dt_init_floor: float = 1e-4
    """Initial step sizes are at least this."""

    embedding_init_std: float = 0.02
    """Standard deviation of the embedding's initial values."""

    @property
    def d_inner(self) -> int:
        """Channels of the Mamba mixer (E)."""
        return self.expand * self.hidden_size

    @property
    def resolved_dt_rank(self) -> int:
        """Rank of the step-size projection (R)."""
        return ceil(self.hidden_size / 16) if self.dt_rank is None else self.dt_rank

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head."""
        if self.kv_channels is not None:
            return self.kv_channels
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads."""
        if self.num_query_groups is None:
            return self.num_attention_heads
        return self.num_query_groups
