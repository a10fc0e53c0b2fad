"""Translates a run's configuration into megatron's TransformerConfig, in one place."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from samba_megatron.config import KernelsConfig, ModelConfig, RunConfig
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.model.backend import Implementation
from samba_megatron.platform import distributed

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class SambaTransformerConfig(TransformerConfig):
    """megatron's config with what our layers read besides."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes, with the state space model's."""

    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    """Choices of implementation."""

    recompute_mamba: bool = False
    """Compute the Mamba mixers' inner part again in the backward pass."""

    recompute_parts: tuple[str, ...] = ()
    """Results within layers to compute again in the backward pass, by their names in
    ``parallel.recompute_modules``."""

    sequences_end_to_end: bool = False
    """Give the model a micro-batch's sequences as one row (see ``model/sequence.py``)."""

    sequence_pieces: int = 1
    """Pieces that a sequence goes through the model in."""

    sequence_piece_gradients: str = "exact"
    """Whether gradients flow from piece to piece: ``exact``, or ``truncated``."""


def params_dtype(config: RunConfig) -> torch.dtype:
    """Dtype of parameters and activations (``auto``: bf16 on a GPU, fp32 on a CPU)."""
    name = config.precision.params_dtype
    if name == "auto":
        name = "bf16" if distributed.device_type() == "cuda" else "fp32"
    return _DTYPES[name]


def build_transformer_config(
    config: RunConfig, implementation: Implementation
) -> SambaTransformerConfig:
    """The megatron config of ``config`` for a layer backend.

    Args:
        config: the run's checked configuration.
        implementation: the layer backend, as :func:`choose_implementation` resolved it.
    """
    model = config.model
    return SambaTransformerConfig(
        model=model,
        kernels=config.kernels,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # Weights are drawn by samba_megatron.model.initialization, the same for every layout.
        perform_initialization=False,
        transformer_impl=implementation,
        deterministic_mode=config.training.deterministic,
        **_layers(model),
        **_precision(config),
        **_parallelism(config),
        **_recomputation(config),
        **_fusions(config, implementation),
    )


def _layers(model: ModelConfig) -> dict[str, Any]:
    symbols = layer_symbols(model.hybrid_layer_pattern)
    fields: dict[str, Any] = {"num_layers": len(symbols), "is_hybrid_model": True}
    if model.window_size is not None:
        fields["window_size"] = (model.window_size - 1, 0)
        # megatron asks this list, by layer number, whether the window holds: not for "F".
        fields["window_attn_skip_freq"] = [int(symbol != "F") for symbol in symbols]
    return fields


def _precision(config: RunConfig) -> dict[str, Any]:
    precision, dtype = config.precision, params_dtype(config)
    residual_dtype = torch.float32 if precision.fp32_residual_connection else dtype
    fields: dict[str, Any] = {
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "pipeline_dtype": residual_dtype,
        "fp32_residual_connection": precision.fp32_residual_connection,
    }
    if precision.fp8 is not None:
        fields |= {
            "fp8": precision.fp8,
            "fp8_recipe": precision.fp8_recipe,
            "fp8_amax_history_len": precision.fp8_amax_history_len,
            "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
            "fp8_param": precision.fp8_param_gather,
        }
    return fields


def _parallelism(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        # The loss is summed over tokens and divided once by their number over the whole batch,
        # so it does not depend on how the batch is cut into micro-batches and ranks.
        "calculate_per_token_loss": True,
        # The interleaved schedule without overlapped p2p is silently wrong over gloo.
        "overlap_p2p_comm": interleaved,
        # Only where documents are kept apart: then sequences are too. Ranks that share a sequence
        # have a piece of each.
        "sequences_end_to_end": config.data.reset_at_document_boundaries
        and parallel.context_parallel_size == 1,
        "sequence_pieces": parallel.sequence_pieces,
        "sequence_piece_gradients": parallel.sequence_piece_gradients,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": True,
    }


def _recomputation(config: RunConfig) -> dict[str, Any]:
    parallel = config.parallel
    if parallel.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": parallel.recompute_method,
            "recompute_num_layers": parallel.recompute_num_layers,
        }
    if parallel.recompute_granularity is None:
        return {}
    theirs = {"attention": "core_attn", "mlp": "mlp"}
    modules = [theirs[m] for m in parallel.recompute_modules if m in theirs]
    fields: dict[str, Any] = {
        "recompute_mamba": "mamba" in parallel.recompute_modules,
        "recompute_parts": parallel.recomputed_parts,
    }
    if modules:
        fields |= {"recompute_granularity": "selective", "recompute_modules": modules}
    return fields


_LARGEST_INT = 1 << 31
"""Transformer Engine's rotary kernel computes a number's place as an int, and reads elsewhere past
that many."""


def tokens_at_once(config: RunConfig) -> int:
    """The most that a rank's layers have at a time: of a training micro-batch, or of one sequence
    that is validated."""
    parallel, pieces = config.parallel, config.parallel.sequence_pieces
    trained = config.training.micro_batch_size * config.data.sequence_length // pieces
    validated = max(config.validation.sequence_lengths or [0])
    if pieces > 1:  # long ones are cut into pieces like training's
        validated = min(validated, config.data.sequence_length // pieces)
    return max(trained, validated) // parallel.context_parallel_size


def counts_rotary_in_32_bits(config: RunConfig) -> bool:
    """Whether Transformer Engine's rotary kernel can count the numbers in a rank's joined
    projection: all of it where ranks share a key/value head, and each cuts its part out."""
    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    width = (model.num_attention_heads + 2 * model.kv_heads) * model.head_dim
    if tensor <= model.kv_heads:
        width //= tensor
    return tokens_at_once(config) * width < _LARGEST_INT


def _fusions(config: RunConfig, implementation: Implementation) -> dict[str, Any]:
    with_te = implementation == "transformer_engine"
    cross_entropy = config.kernels.cross_entropy
    fused_loss = with_te if cross_entropy == "auto" else cross_entropy == "transformer_engine"
    return {
        # The name is megatron's for an activation that is a module of its own: ours.
        "use_te_activation_func": True,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # megatron's own linears would need Apex for it; Transformer Engine's are told by
        # training.data_parallel.
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": with_te and counts_rotary_in_32_bits(config),
        "cross_entropy_loss_fusion": fused_loss,
        "cross_entropy_fusion_impl": "te",
    }
