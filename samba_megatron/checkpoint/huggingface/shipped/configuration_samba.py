"""Configuration of Samba for transformers (4.57 and 5), shipped with every exported model.

The fields are those of the Samba model in flash-linear-attention, so that one folder serves both.
What those cannot say (other orders of layers, no position embedding, a free MLP width, a short
convolution on queries, keys and values) is in five fields more, and then the model type is
``samba_hybrid``: a class that does not know the fields never takes such a folder.
"""

import math
from typing import Any, ClassVar

from transformers import PretrainedConfig

_ATTENTION = {
    "layers": (1, 3, 5, 7, 9, 11, 13, 15, 17),
    "num_heads": 18,
    "num_kv_heads": 18,
    "qkv_bias": False,
    "window_size": 2048,
    "rope_theta": 10000.0,
}


class SambaConfig(PretrainedConfig):
    """Sizes of a Samba model: blocks of a mixer (Mamba-1 or attention) and a SwiGLU MLP.

    Args:
        hidden_size: width of the residual stream.
        state_size: state dimensions a channel of the scan.
        num_hidden_layers: blocks.
        norm_eps: epsilon of every RMSNorm.
        expand: inner width of the Mamba mixer over hidden_size.
        conv_kernel: taps of its causal convolution.
        time_step_rank: rank of the step-size projection; "auto": ceil(hidden_size / 16).
        attn: ``layers`` (the blocks with attention), ``num_heads``, ``num_kv_heads``,
            ``window_size`` (keys a query sees, itself included; None: all), ``rope_theta``.
        hidden_ratio: the MLP is 2/3 * hidden_ratio * hidden_size wide, rounded up to 256.
        layer_pattern: letters of the layers, if they are not mixer and MLP in turn: ``M`` Mamba,
            ``*`` attention in the window, ``F`` attention without one, ``-`` MLP.
        head_dim: dimensions of a head, if not hidden_size / num_heads.
        mlp_hidden_size: width of the MLP, if hidden_ratio cannot give it.
        use_rope: rotary position embedding in the attention layers.
        short_convolution: causal convolution and SiLU on queries, keys and values.
    """

    model_type = "samba"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        hidden_size: int = 2304,
        state_size: int = 16,
        num_hidden_layers: int = 18,
        norm_eps: float = 1e-5,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        expand: int = 2,
        conv_kernel: int = 4,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        hidden_act: str = "swish",
        initializer_range: float = 0.02,
        time_step_rank: int | str = "auto",
        time_step_scale: float = 1.0,
        time_step_min: float = 0.001,
        time_step_max: float = 0.1,
        time_step_init_scheme: str = "random",
        time_step_floor: float = 1e-4,
        max_position_embeddings: int = 2048,
        attn: dict[str, Any] | None = None,
        hidden_ratio: float | None = 4,
        vocab_size: int = 32000,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        layer_pattern: str | None = None,
        head_dim: int | None = None,
        mlp_hidden_size: int | None = None,
        use_rope: bool = True,
        short_convolution: bool = False,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.state_size = state_size
        self.num_hidden_layers = num_hidden_layers
        self.norm_eps = norm_eps
        self.expand = expand
        self.conv_kernel = conv_kernel
        self.use_bias = use_bias
        self.use_conv_bias = use_conv_bias
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        automatic = time_step_rank == "auto"
        self.time_step_rank = math.ceil(hidden_size / 16) if automatic else int(time_step_rank)
        self.time_step_scale = time_step_scale
        self.time_step_min = time_step_min
        self.time_step_max = time_step_max
        self.time_step_init_scheme = time_step_init_scheme
        self.time_step_floor = time_step_floor
        self.max_position_embeddings = max_position_embeddings
        self.attn = dict(_ATTENTION if attn is None else attn)
        self.hidden_ratio = hidden_ratio
        self.vocab_size = vocab_size
        self.use_cache = use_cache
        self.intermediate_size = int(expand * hidden_size)
        self.layer_pattern = layer_pattern
        self.head_dim = head_dim
        self.mlp_hidden_size = mlp_hidden_size
        self.use_rope = use_rope
        self.short_convolution = short_convolution
        if use_bias or not use_conv_bias or hidden_act not in ("swish", "silu"):
            raise ValueError("only use_bias false, use_conv_bias true and hidden_act swish exist")
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def blocks(self) -> list[tuple[str | None, bool]]:
        """For each block its mixer's letter, if it has one, and whether it has an MLP."""
        if self.layer_pattern is None:
            window = self.attn.get("window_size")
            attention = "F" if window is None else "*"
            layers = set(self.attn["layers"])
            return [
                (attention if i in layers else "M", True) for i in range(self.num_hidden_layers)
            ]
        blocks: list[tuple[str | None, bool]] = []
        for letter in self.layer_pattern:
            if letter != "-":
                blocks.append((letter, False))
            elif blocks and not blocks[-1][1]:
                blocks[-1] = (blocks[-1][0], True)
            else:
                blocks.append((None, True))
        return blocks

    @property
    def attention_head_dim(self) -> int:
        """Dimensions of one attention head."""
        return self.head_dim or self.hidden_size // self.attn["num_heads"]

    @property
    def attention_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.attn.get("num_kv_heads") or self.attn["num_heads"]

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        if self.mlp_hidden_size is not None:
            return self.mlp_hidden_size
        width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
        return 256 * ((width + 255) // 256)


class SambaHybridConfig(SambaConfig):
    """A Samba variant that only the code beside this file knows."""

    model_type = "samba_hybrid"

    # Written out, since transformers 5 gives a configuration without a constructor its own.
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
