"""``config.json``: the fields of flash-linear-attention's SambaConfig, and what they cannot say."""

import re
from typing import Any

from samba_megatron.checkpoint.huggingface.tensors import block_numbers
from samba_megatron.config import ModelConfig
from samba_megatron.config.pattern import ATTENTION, FULL_ATTENTION, MAMBA, MLP, layer_symbols
from samba_megatron.model.layers import KINDS
from samba_megatron.platform.errors import UserError

SAMBA = "samba"
HYBRID = "samba_hybrid"
_MIXER_AND_MLP = re.compile(r"([M*F]-)+")


def beyond_fla(model: ModelConfig) -> list[str]:
    """What of a model flash-linear-attention's class cannot express, in words; empty: nothing."""
    symbols = layer_symbols(model.hybrid_layer_pattern)
    attends = ATTENTION in symbols or FULL_ATTENTION in symbols
    reasons = {
        "layers that are not mixer and MLP in turn": not _MIXER_AND_MLP.fullmatch(symbols),
        "attention with a window and without one": ATTENTION in symbols
        and FULL_ATTENTION in symbols
        and model.window_size is not None,
        "no position embedding": attends and model.position_embedding_type == "none",
        "a short convolution": attends and model.short_convolution,
        "heads that are not hidden_size wide together": attends
        and model.head_dim * model.num_attention_heads != model.hidden_size,
        "an MLP whose width is no multiple of 256": MLP in symbols
        and hidden_ratio(model.hidden_size, model.ffn_hidden_size) is None,
    }
    return [reason for reason, holds in reasons.items() if holds]


def to_fields(model: ModelConfig, max_length: int, ids: dict[str, int | None]) -> dict[str, Any]:
    """The content of ``config.json``, but for the dtype.

    Args:
        model: sizes.
        max_length: tokens of a training sequence.
        ids: ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
    """
    symbols = layer_symbols(model.hybrid_layer_pattern)
    ratio = hidden_ratio(model.hidden_size, model.ffn_hidden_size)
    hybrid = bool(beyond_fla(model))
    prefix = "SambaHybrid" if hybrid else "Samba"
    fields: dict[str, Any] = {
        "model_type": HYBRID if hybrid else SAMBA,
        "architectures": [f"{prefix}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_samba.{prefix}Config",
            "AutoModelForCausalLM": f"modeling_samba.{prefix}ForCausalLM",
        },
        "hidden_size": model.hidden_size,
        "state_size": model.d_state,
        "num_hidden_layers": block_numbers(symbols)[-1] + 1,
        "norm_eps": model.layernorm_epsilon,
        "expand": model.expand,
        "conv_kernel": model.d_conv,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "swish",
        "hidden_ratio": ratio,
        "initializer_range": model.embedding_init_std,
        "time_step_rank": model.resolved_dt_rank,
        "time_step_scale": 1.0,
        "time_step_min": model.dt_min,
        "time_step_max": model.dt_max,
        "time_step_init_scheme": "random",
        "time_step_floor": model.dt_init_floor,
        "max_position_embeddings": max_length,
        "attn": _attention_fields(model, symbols),
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "use_cache": True,
        **ids,
    }
    if hybrid:
        fields |= {
            "layer_pattern": symbols,
            "head_dim": model.head_dim,
            "mlp_hidden_size": model.ffn_hidden_size,
            "use_rope": model.position_embedding_type == "rope",
            "short_convolution": model.short_convolution,
        }
    return fields


def _attention_fields(model: ModelConfig, symbols: str) -> dict[str, Any]:
    blocks = zip(symbols, block_numbers(symbols), strict=True)
    return {
        "layers": [block for symbol, block in blocks if symbol in (ATTENTION, FULL_ATTENTION)],
        "num_heads": model.num_attention_heads,
        "num_kv_heads": model.kv_heads,
        "qkv_bias": False,
        "window_size": model.window_size if ATTENTION in symbols else None,
        "rope_theta": float(model.rotary_base),
    }


def from_fields(fields: dict[str, Any]) -> ModelConfig:
    """The sizes that ``config.json`` states.

    Raises:
        UserError: if it is of another architecture, or of a variant that does not exist here.
    """
    kind = fields.get("model_type")
    if kind not in (SAMBA, HYBRID):
        raise UserError(
            f"config.json says model_type {kind!r}, an architecture that cannot be imported: only "
            f"{SAMBA} and {HYBRID} can"
        )
    _refuse_variants(fields)
    try:
        return _model(fields, fields["attn"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"config.json is not a complete Samba configuration ({error!r})") from None


def _model(fields: dict[str, Any], attention: dict[str, Any]) -> ModelConfig:
    d, heads = fields["hidden_size"], attention["num_heads"]
    rank = fields["time_step_rank"]
    kv_heads, head_dim = attention.get("num_kv_heads") or heads, fields.get("head_dim")
    window = attention.get("window_size")
    return ModelConfig(
        hybrid_layer_pattern=_pattern(fields, attention),
        hidden_size=d,
        ffn_hidden_size=fields.get("mlp_hidden_size") or mlp_width(d, fields["hidden_ratio"]),
        num_attention_heads=heads,
        num_query_groups=None if kv_heads == heads else kv_heads,
        kv_channels=None if head_dim in (None, d // heads) else head_dim,
        window_size=window,
        position_embedding_type="rope" if fields.get("use_rope", True) else "none",
        rotary_base=int(attention.get("rope_theta", 10000)),
        short_convolution=fields.get("short_convolution", False),
        vocab_size=fields["vocab_size"],
        share_embeddings_and_output_weights=fields.get("tie_word_embeddings", False),
        layernorm_epsilon=fields["norm_eps"],
        d_state=fields["state_size"],
        d_conv=fields["conv_kernel"],
        expand=fields["expand"],
        dt_rank=None if rank in ("auto", -(-d // 16)) else rank,
        dt_min=fields["time_step_min"],
        dt_max=fields["time_step_max"],
        dt_init_floor=fields["time_step_floor"],
        embedding_init_std=fields["initializer_range"],
    )


def _pattern(fields: dict[str, Any], attention: dict[str, Any]) -> str:
    """The layer pattern, repeats drawn together: ``M-*- x6``."""
    symbols = fields.get("layer_pattern")
    if symbols is None:
        layers = set(attention["layers"])
        symbols = "".join(
            f"{ATTENTION if i in layers else MAMBA}{MLP}"
            for i in range(fields["num_hidden_layers"])
        )
    if not symbols or any(symbol not in KINDS for symbol in symbols):
        raise UserError(
            f"config.json has the layer_pattern {symbols!r}: its letters must be {' '.join(KINDS)}"
        )
    for size in range(1, len(symbols) // 2 + 1):
        if symbols == symbols[:size] * (len(symbols) // size):
            return f"{symbols[:size]} x{len(symbols) // size}"
    return str(symbols)


def _refuse_variants(fields: dict[str, Any]) -> None:
    attention = fields.get("attn") or {}
    variants = {
        "use_bias": fields.get("use_bias", False),
        "use_conv_bias false": not fields.get("use_conv_bias", True),
        "attn.qkv_bias": attention.get("qkv_bias", False),
        "attn.qk_norm": attention.get("qk_norm", False),
        "attnres_block_size": fields.get("attnres_block_size") is not None,
        f"hidden_act {fields.get('hidden_act')}": fields.get("hidden_act", "swish")
        not in ("swish", "silu"),
    }
    found = [name for name, present in variants.items() if present]
    if found:
        raise UserError(f"config.json sets {', '.join(found)}, which this Samba does not have")


def mlp_width(hidden_size: int, ratio: float) -> int:
    """Width of flash-linear-attention's MLP."""
    return 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)


def hidden_ratio(hidden_size: int, width: int) -> float | None:
    """A ratio that gives an MLP this width, the roundest there is; None if none does."""
    if width % 256:
        return None
    exact = 1.5 * width / hidden_size
    candidates = [round(exact * steps) / steps for steps in (1, 2, 4, 8, 16)]
    candidates += [int(exact * steps) / steps for steps in (1, 2, 4, 8, 16)]
    fitting = [r for r in (*candidates, exact) if mlp_width(hidden_size, r) == width]
    return min(fitting, key=lambda r: len(repr(r))) if fitting else None
