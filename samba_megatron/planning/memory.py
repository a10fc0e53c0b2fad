"""Memory of a run's fullest device, before anything is started; neither torch nor megatron is read.

The sum over the layers of what each keeps (:meth:`LayerKind.saved_activations`), as pipeline,
tensor and sequence parallelism, recomputation and FP8 change it, with weights, gradients and
optimizer.
Measured steps of 421M and 1.3B on one H200 are met within 3 % (``docs/performance.md``).
"""

from dataclasses import dataclass

from samba_megatron.config import RunConfig
from samba_megatron.config.pattern import split_stages
from samba_megatron.model.layers import KINDS

_RECOMPUTE_NAMES = {"M": "mamba", "*": "attention", "F": "attention", "-": "mlp"}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device of the pipeline stage that needs most."""

    stage: int
    """That stage, from 0."""
    weights: int
    """Parameters, and their FP8 copies."""
    gradients: int
    """The gradient buffer."""
    optimizer: int
    """This rank's part of the main parameters and moments."""
    activations: int
    """What the layers keep for the backward pass, of all micro-batches under way."""
    head: int
    """Logits and their loss; zero but on the last stage."""

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.head

    def __str__(self) -> str:
        parts = [
            f"{name} {getattr(self, name) / 2**30:.1f}"
            for name in ("weights", "gradients", "optimizer", "activations", "head")
            if getattr(self, name)
        ]
        return f"{self.total_bytes / 2**30:.1f} GiB a device ({', '.join(parts)})"


def estimate(config: RunConfig, world_size: int) -> MemoryEstimate:
    """What the fullest device of a training run holds at its peak.

    Args:
        config: a configuration whose layout fits ``world_size``.
        world_size: devices of the whole run.
    """
    pipeline = config.parallel.pipeline_model_parallel_size
    stages = [_stage(config, world_size, stage) for stage in range(pipeline)]
    return max(stages, key=lambda stage: stage.total_bytes)


def _stage(config: RunConfig, world_size: int, stage: int) -> MemoryEstimate:
    model, parallel, precision = config.model, config.parallel, config.precision
    pipeline = parallel.pipeline_model_parallel_size
    chunks = split_stages(
        model.hybrid_layer_pattern, pipeline, parallel.virtual_pipeline_model_parallel_size
    )[stage::pipeline]
    first, last = stage == 0, stage == pipeline - 1
    element = 4 if precision.params_dtype == "fp32" else 2
    tensor = parallel.tensor_model_parallel_size
    layers = sum(KINDS[symbol].parameters(model) for chunk in chunks for symbol in chunk) // tensor
    tied = model.share_embeddings_and_output_weights
    ends = 2 if first and last and not tied else int(first or last)
    parameters = layers + ends * model.vocab_size * model.hidden_size // tensor
    # FP8 linears keep their weight as it is and transposed, a byte each.
    copies = 2 * layers if precision.fp8 else 0
    in_fp32 = element == 4 or precision.accumulate_allreduce_grads_in_fp32
    data_parallel = max(world_size // (tensor * pipeline), 1)
    return MemoryEstimate(
        stage=stage,
        weights=element * parameters + copies,
        gradients=(4 if in_fp32 else 2) * parameters,
        optimizer=(8 if element == 4 else 12) * parameters // data_parallel,
        activations=_activations(config, world_size, chunks, stage, element),
        head=_head(config, element) if last else 0,
    )


def _head(config: RunConfig, element: int) -> int:
    """Logits of one micro-batch, and their softmax in fp32."""
    tokens = config.training.micro_batch_size * config.data.sequence_length
    vocabulary = config.model.vocab_size // config.parallel.tensor_model_parallel_size
    return tokens * vocabulary * (element + 4)


def _activations(
    config: RunConfig, world_size: int, chunks: list[str], stage: int, element: int
) -> int:
    tokens = config.training.micro_batch_size * config.data.sequence_length
    under_way = _micro_batches_under_way(config, world_size, stage)
    average = sum(_chunk_bytes(config, chunk, element) for chunk in chunks) / len(chunks)
    return int(tokens * (average * under_way + _working_bytes(config, chunks, element)))


def _micro_batches_under_way(config: RunConfig, world_size: int, stage: int) -> int:
    """Chunk passes whose backward pass has not come when a stage is fullest (1F1B, interleaved)."""
    parallel, training = config.parallel, config.training
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    model_parallel = pipeline * parallel.tensor_model_parallel_size
    data_parallel = max(world_size // model_parallel, 1)
    number = max(training.global_batch_size // (training.micro_batch_size * data_parallel), 1)
    if virtual is None:
        return min(pipeline - stage, number)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, number * virtual)


def _chunk_bytes(config: RunConfig, chunk: str, element: int) -> float:
    """Bytes a token that one pass through a chunk keeps."""
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return sum(_layer_bytes(config, symbol, element) for symbol in chunk)
    kept = config.model.hidden_size * element / _sequence_split(config)
    number = parallel.recompute_num_layers
    if parallel.recompute_method == "uniform":
        return kept * -(-len(chunk) // number)
    rest = sum(_layer_bytes(config, symbol, element) for symbol in chunk[number:])
    return kept * min(number, len(chunk)) + rest


def _working_bytes(config: RunConfig, chunks: list[str], element: int) -> float:
    """Bytes a token of the layers that are being computed again, once more in full."""
    parallel = config.parallel
    if parallel.recompute_granularity != "full":
        return 0.0
    at_once = parallel.recompute_num_layers if parallel.recompute_method == "uniform" else 1
    return max(
        sum(_layer_bytes(config, symbol, element) for symbol in chunk[start : start + at_once])
        for chunk in chunks
        for start in range(0, len(chunk), at_once)
    )


def _layer_bytes(config: RunConfig, symbol: str, element: int) -> float:
    """Bytes a token that one layer keeps."""
    parallel = config.parallel
    saved = KINDS[symbol].saved_activations(config.model)
    selective = parallel.recompute_granularity == "selective"
    again = selective and _RECOMPUTE_NAMES[symbol] in parallel.recompute_modules
    inner = saved.inner - (saved.recomputable if again else 0)
    operand = 1 if config.precision.fp8 else element
    stream = saved.stream * element + saved.stream_operands * operand
    tensor = parallel.tensor_model_parallel_size
    return (
        stream / _sequence_split(config)
        + (inner * element + saved.inner_operands * operand) / tensor
    )


def _sequence_split(config: RunConfig) -> int:
    parallel = config.parallel
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
