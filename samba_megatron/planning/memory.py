"""Memory of a run's fullest device, before anything is started; neither torch nor megatron is read.

The sum over the layers of what each keeps (:meth:`LayerKind.saved_activations`), as pipeline,
tensor, context and sequence parallelism, recomputation and FP8 change it, with weights, gradients
and optimizer. Weights, gradients and optimizer are exact but for the padding of megatron's buffers
(a few hundred numbers a bucket); ``docs/planning.md`` has the errors of the rest, as measured.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from samba_megatron.config import ParallelConfig, RunConfig
from samba_megatron.model.layers import KINDS
from samba_megatron.model.samba import RECOMPUTED_KINDS, count_parameters
from samba_megatron.ops.cost import chunk_tokens
from samba_megatron.planning.layout import Layout


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
    activations_by_kind: dict[str, int] = field(default_factory=dict)
    """``activations`` by kind of layer, and ``recomputing``: the layers computed again at once."""

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
    layout = Layout(config, world_size)
    stages = [stage_memory(layout, stage) for stage in range(layout.pipeline)]
    return max(stages, key=lambda stage: stage.total_bytes)


def stage_memory(layout: Layout, stage: int) -> MemoryEstimate:
    """What a device of one pipeline stage holds at its peak."""
    precision, element = layout.config.precision, layout.element
    parameters = layout.parameters(stage)
    # In a bf16 model these need no copy in fp32, and their gradients are fp32 in any case.
    fp32 = layout.fp32_parameters(stage) if element == 2 else parameters
    in_bf16 = parameters - fp32
    # FP8 linears keep their weight as it is and transposed, a byte each: beside it, or instead.
    kept = layout.kept_in_fp8(stage)
    copies = 2 * (kept or layout.layer_parameters(stage)) if precision.fp8 else 0
    gradient = 4 if precision.accumulate_allreduce_grads_in_fp32 else 2
    by_kind = _activations(layout, stage)
    head = _head(layout) if stage == layout.pipeline - 1 else 0
    return MemoryEstimate(
        stage=stage,
        weights=2 * (in_bf16 - kept) + 4 * fp32 + copies,
        gradients=gradient * in_bf16 + 4 * fp32,
        optimizer=(12 * in_bf16 + 8 * fp32) // layout.optimizer_ranks,
        activations=sum(by_kind.values()),
        # Recomputation begins when the logits are gone.
        head=max(head - by_kind.get("recomputing", 0), 0),
        activations_by_kind=by_kind,
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of one checkpoint: weights in their type, and main copies and moments in fp32."""
    per_parameter = 16 if config.precision.params_dtype == "fp32" else 14
    return per_parameter * count_parameters(config.model)


def _head(layout: Layout) -> int:
    """Logits of one micro-batch and their gradient, by megatron's loss their softmax in fp32; or
    those of a chunk, over which their gradient is written, and what is made of it: the hidden
    states' gradient, and the weight's in fp32."""
    hidden, columns = layout.config.model.hidden_size, layout.config.model.vocab_size
    columns //= layout.tensor
    kernels = layout.config.kernels
    loss = kernels.cross_entropy
    if loss == "auto" and kernels.transformer_impl == "local":
        loss = "megatron"
    if loss != "chunked":
        gradient = 4 if loss == "megatron" else layout.element
        return layout.tokens * columns * (layout.element + gradient)
    chunk = chunk_tokens(layout.tokens, columns, layout.element)
    # Sequence parallelism gathers the hidden states for the product.
    streams = 2 if layout.sequence_split > 1 else 1
    gradients = streams * layout.tokens * hidden * layout.element + 4 * columns * hidden
    return chunk * columns * layout.element + gradients


def _activations(layout: Layout, stage: int) -> dict[str, int]:
    """Bytes by kind of layer."""
    chunks, tokens = layout.chunks(stage), layout.tokens
    passes = _micro_batches_under_way(layout, stage) / len(chunks)
    kept: dict[str, float] = {}
    for chunk in chunks:
        for name, number in _chunk_bytes(layout, chunk).items():
            kept[name] = kept.get(name, 0.0) + number
    by_kind = {name: int(tokens * passes * number) for name, number in kept.items()}
    if again := _working_bytes(layout, chunks):
        by_kind["recomputing"] = int(tokens * again)
    if carried := _carried_bytes(layout, "".join(chunks)):
        by_kind["between pieces"] = carried
    return by_kind


def _carried_bytes(layout: Layout, symbols: str) -> int:
    """What the pieces of a sequence leave to the next ones, and what a piece joins it with."""
    if layout.pieces == 1:
        return 0
    config, model = layout.config, layout.config.model
    keys = 2 * model.kv_heads * model.head_dim * layout.element
    states = model.d_inner * model.d_state * 4
    total = 0
    for symbol in symbols:
        whole = config.data.sequence_length
        window = keys * min((model.window_size or whole) - 1, whole)
        # Without a window each piece leaves all keys so far: half of them on average.
        left = {"*": window, "F": keys * whole // 2, "M": states}.get(symbol, 0)
        joined = {"*": keys, "F": keys, "M": model.d_inner * layout.element}.get(symbol, 0)
        left *= config.training.micro_batch_size * (layout.pieces if layout.has_first_pass else 1)
        total += left + joined * layout.tokens
    return total // layout.tensor


def _micro_batches_under_way(layout: Layout, stage: int) -> int:
    """Chunk passes whose backward pass has not come when a stage is fullest (1F1B, interleaved)."""
    pipeline, virtual, number = layout.pipeline, layout.virtual, layout.micro_batches
    if virtual == 1:
        return min(pipeline - stage, number)
    return min(2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, number * virtual)


def _chunk_bytes(layout: Layout, chunk: str) -> dict[str, float]:
    """Bytes a token that one pass through a chunk keeps, by kind of layer."""
    parallel = layout.config.parallel
    if parallel.recompute_granularity != "full":
        return _sum_by_kind(layout, chunk)
    kept = layout.config.model.hidden_size * layout.element / layout.sequence_split
    number = parallel.recompute_num_layers
    if parallel.recompute_method == "uniform":
        return {"layer inputs": kept * -(-len(chunk) // number)}
    inputs = {"layer inputs": kept * min(number, len(chunk))}
    return inputs | _sum_by_kind(layout, chunk[number:])


def _sum_by_kind(layout: Layout, symbols: str) -> dict[str, float]:
    return {
        KINDS[symbol].name: count * layer_bytes(layout, symbol)
        for symbol, count in Counter(symbols).items()
    }


def _working_bytes(layout: Layout, chunks: list[str]) -> float:
    """Bytes a token of the layers that are being computed again, once more in full; of what one
    layer computes again where that is all."""
    parallel = layout.config.parallel
    if parallel.recompute_granularity != "full":
        present = set("".join(chunks))
        return max(layer_bytes(layout, s, ()) - layer_bytes(layout, s) for s in present)
    at_once = parallel.recompute_num_layers if parallel.recompute_method == "uniform" else 1
    return max(
        sum(layer_bytes(layout, symbol) for symbol in chunk[start : start + at_once])
        for chunk in chunks
        for start in range(0, len(chunk), at_once)
    )


def recomputes(parallel: ParallelConfig, symbol: str) -> bool:
    """Whether selective recomputation is asked for of this whole kind of layer."""
    if parallel.recompute_granularity != "selective":
        return False
    return any(symbol in RECOMPUTED_KINDS.get(name, "") for name in parallel.recompute_modules)


def layer_bytes(layout: Layout, symbol: str, recomputed: Collection[str] | None = None) -> float:
    """Bytes a token that one layer keeps for its backward pass, on one device.

    Args:
        layout: the configuration on its devices.
        symbol: the layer's letter.
        recomputed: names as in ``parallel.recompute_modules``; those of the configuration when
            absent.
    """
    parallel, element = layout.config.parallel, layout.element
    if recomputed is None:
        selective = parallel.recompute_granularity == "selective"
        recomputed = parallel.recompute_modules if selective else ()
    saved = KINDS[symbol].saved_activations(layout.config.model, recomputed)
    operand = 1 if layout.config.precision.fp8 else element
    stream = saved.stream * element + saved.stream_operands * operand
    return (
        stream / layout.sequence_split
        + (saved.inner * element + saved.inner_operands * operand) / layout.tensor
    )
