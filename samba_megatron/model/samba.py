"""Assembles Samba on megatron's HybridModel, and sums what the layers say of themselves."""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samba_megatron.config import ModelConfig, ParallelConfig, RunConfig
from samba_megatron.config.pattern import (
    describe_layers,
    layer_symbols,
    split_stages,
    to_megatron,
)
from samba_megatron.model.layers import KINDS

if TYPE_CHECKING:
    from torch import nn

    from samba_megatron.model.backend import Implementation


def count_parameters(model: ModelConfig) -> int:
    """Trainable numbers of the whole model: layers, final norm, embedding and untied head."""
    layers = sum(
        KINDS[symbol].parameters(model) for symbol in layer_symbols(model.hybrid_layer_pattern)
    )
    matrices = 1 if model.share_embeddings_and_output_weights else 2
    return layers + model.hidden_size + matrices * model.vocab_size * model.hidden_size


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations a token of a training sequence; a multiply-add counts two."""

    forward: float
    """One forward pass."""

    recomputed: float = 0.0
    """Done again in the backward pass to save memory."""

    @property
    def model(self) -> float:
        """Forward and backward pass, without recomputation: what MFU counts."""
        return 3 * self.forward

    @property
    def hardware(self) -> float:
        """All that the device does."""
        return self.model + self.recomputed


def flops_per_token(
    model: ModelConfig, sequence_length: int, parallel: ParallelConfig | None = None
) -> FlopsPerToken:
    """Sums the layers and the head; attention counts the keys inside its window only.

    Args:
        model: sizes.
        sequence_length: tokens of a sequence; only attention depends on it.
        parallel: says what is recomputed; nothing where not given.
    """
    counts = Counter(layer_symbols(model.hybrid_layer_pattern))
    layers = sum(
        n * KINDS[symbol].flops_per_token(model, sequence_length) for symbol, n in counts.items()
    )
    again = _recomputed_flops(model, sequence_length, parallel) if parallel else 0.0
    return FlopsPerToken(layers + 2 * model.hidden_size * model.vocab_size, again)


RECOMPUTED_KINDS = {"mamba": "M", "attention": "*F", "mlp": "-"}
"""The layers that each name in ``parallel.recompute_modules`` computes again whole; its other names
are results within layers (:meth:`LayerKind.recomputable_parts`)."""


def _recomputed_flops(model: ModelConfig, sequence_length: int, parallel: ParallelConfig) -> float:
    """A token's forward operations that the backward pass does again."""
    layers = layer_symbols(model.hybrid_layer_pattern)
    parts = [KINDS[s].recomputable_parts(model) for s in layers]
    again = sum(part[n].flops for n in parallel.recomputed_parts for part in parts if n in part)
    if parallel.sequence_pieces > 1 and parallel.sequence_piece_gradients == "exact":
        # A first pass through all pieces but the last; no layer is recomputed whole then.
        forward = sum(KINDS[s].flops_per_token(model, sequence_length) for s in layers)
        return again + forward * (1 - 1 / parallel.sequence_pieces)
    if parallel.recompute_granularity is None:
        return 0.0
    if parallel.recompute_granularity == "selective":
        whole = "".join(RECOMPUTED_KINDS.get(name, "") for name in parallel.recompute_modules)
        symbols = [s for s in layers if s in whole]
        return again + sum(
            KINDS[s].recomputed_flops_per_token(model, sequence_length) for s in symbols
        )
    stages = split_stages(
        model.hybrid_layer_pattern,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    first = parallel.recompute_num_layers if parallel.recompute_method == "block" else None
    return sum(
        KINDS[symbol].flops_per_token(model, sequence_length)
        for stage in stages
        for symbol in stage[:first]
    )


def build_model(
    config: RunConfig, implementation: "Implementation", initialize: bool = True
) -> "list[nn.Module]":
    """This rank's model chunks (one, or ``virtual_pipeline_model_parallel_size`` of them).

    Args:
        config: the run's configuration; the process groups of its layout must be up.
        implementation: the layer backend.
        initialize: draw the weights (see :mod:`samba_megatron.model.initialization`); without it
            they are whatever the memory holds, to be loaded.
    """
    from megatron.core import parallel_state

    from samba_megatron.model.initialization import initialize_weights

    virtual = config.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if virtual is None else list(range(virtual)):
        first = parallel_state.is_pipeline_first_stage(
            ignore_virtual=virtual is None, vp_stage=vp_stage
        )
        last = parallel_state.is_pipeline_last_stage(
            ignore_virtual=virtual is None, vp_stage=vp_stage
        )
        chunk = _build_chunk(config, implementation, first, last, vp_stage)
        if initialize:
            initialize_weights(chunk, config.model, config.training.seed)
        chunks.append(chunk)
    return chunks


def _build_chunk(
    config: RunConfig,
    implementation: "Implementation",
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None,
) -> "nn.Module":
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec

    from samba_megatron.model.backend import build_backend
    from samba_megatron.model.hybrid import SambaModel, SambaStack, stack_submodules
    from samba_megatron.model.transformer_config import build_transformer_config
    from samba_megatron.platform import distributed

    model = config.model
    backend = build_backend(implementation, config)
    chunk = SambaModel(
        build_transformer_config(config, implementation),
        hybrid_stack_spec=ModuleSpec(
            module=SambaStack,
            submodules=stack_submodules(backend),
            params={"final_norm": backend.final_norm},
        ),
        vocab_size=model.vocab_size,
        max_sequence_length=config.data.sequence_length,
        hybrid_layer_pattern=megatron_pattern(config),
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        pg_collection=distributed.process_groups(),
        vp_stage=vp_stage,
    )
    if distributed.device_type() == "cuda":
        chunk.cuda(torch.cuda.current_device())
    return chunk


def megatron_pattern(config: RunConfig) -> str:
    """The pattern as megatron reads it: its letters, with every pipeline cut written out."""
    parallel = config.parallel
    pattern, _ = to_megatron(
        config.model.hybrid_layer_pattern,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    return pattern


def describe_model(config: RunConfig) -> list[tuple[str, str]]:
    """(what, value) lines for the start of a run: layers, sizes, parameters, FLOPs."""
    model, symbols = config.model, layer_symbols(config.model.hybrid_layer_pattern)
    counts = Counter(symbols)
    kinds = ", ".join(f"{n} {KINDS[s].name}" for s, n in counts.items())
    flops = flops_per_token(model, config.data.sequence_length)
    return [
        ("layers", f"{len(symbols)} ({kinds})"),
        *(("", line) for line in _layer_map(config)),
        ("parameters", f"{count_parameters(model):,}"),
        ("model FLOPs a token", f"{flops.model / 1e9:.3f} GFLOP at {config.data.sequence_length}"),
    ]


def _layer_map(config: RunConfig) -> list[str]:
    parallel = config.parallel
    return describe_layers(
        config.model.hybrid_layer_pattern,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
