"""What a step sends over each link, and how long that takes: tensor, context, pipeline, data.

Ring collectives: a rank sends (n - 1) / n of the data for a gather or a scatter, twice that for an
all-reduce. Megatron numbers ranks tensor-parallel first, then context, data and pipeline: groups
within a node's GPUs use NVLink, the others the network.
"""

from dataclasses import dataclass

from samba_megatron.ops.cost import carry_bytes, halo_bytes
from samba_megatron.planning.layout import Layout
from samba_megatron.platform.hardware import Gpu

_BUCKET = 40_000_000
"""Parameters of a gradient bucket in megatron: the last one's reduction cannot be hidden."""
_LATENCY = 15e-6
"""Seconds of a small collective or message."""


@dataclass(frozen=True)
class Transfer:
    """What one kind of parallelism sends, of one rank in one step."""

    name: str
    link: str
    """``NVLink`` or ``network``."""
    bytes: float
    seconds: float
    """Sending it all."""
    exposed_seconds: float
    """Of that, not hidden behind computation."""


def link_of(gpu: Gpu, span: int) -> tuple[str, float]:
    """(name, bytes/s reached) of the link that a group needs whose ranks span so many devices."""
    if span <= gpu.node_gpus:
        return "NVLink", gpu.nvlink * 1e9 * gpu.achieved.nvlink
    return "network", gpu.network * 1e9 * gpu.achieved.network


def tensor_layer(layout: Layout, gpu: Gpu, symbol: str) -> tuple[float, float, float]:
    """(bytes, seconds forward, seconds backward) of a layer's collectives for one micro-batch.

    With sequence parallelism a gather and a scatter forward, and backward these and the gather of
    the input once more; without, an all-reduce each way. Mamba sums x_proj's result each way.
    """
    ranks = layout.tensor
    if ranks == 1:
        return 0.0, 0.0, 0.0
    model = layout.config.model
    share, rate = (ranks - 1) / ranks, link_of(gpu, ranks)[1]
    stream = layout.tokens * model.hidden_size * layout.element * share
    forward = 2 * stream
    backward = (3 if layout.config.parallel.sequence_parallel else 2) * stream
    extra, calls = 0.0, 5
    if symbol == "M":
        width = model.resolved_dt_rank + 2 * model.d_state
        extra, calls = 2 * layout.tokens * width * layout.element * share, 7
    latency = calls * _LATENCY / 2
    return (
        forward + backward + 2 * extra,
        (forward + extra) / rate + latency,
        (backward + extra) / rate + latency,
    )


def context_layer(layout: Layout, gpu: Gpu, symbol: str) -> tuple[float, float, float]:
    """(bytes, seconds forward, seconds backward) of a layer's exchange along the sequence: keys and
    values before a rank's own, or a state and a convolution's inputs; backward, their gradients."""
    ranks, model = layout.context, layout.config.model
    if ranks == 1 or symbol == "-":
        return 0.0, 0.0, 0.0
    part = layout.config.data.sequence_length // ranks
    sequences, element = layout.config.training.micro_batch_size, layout.element
    if symbol == "M":
        channels = model.d_inner // layout.tensor
        size = carry_bytes(ranks, sequences, channels, model.d_state)
        size += halo_bytes(ranks, part, model.d_conv - 1, sequences * channels, element)
        messages = 1 + ranks.bit_length()
    else:
        window = model.window_size if symbol == "*" else None
        wanted = part * ranks if window is None else window - 1
        numbers = sequences * 2 * model.kv_heads * model.head_dim // layout.tensor
        size = halo_bytes(ranks, part, wanted, numbers, element)
        messages = min(-(-wanted // part), ranks - 1)
    seconds = size / link_of(gpu, layout.tensor * ranks)[1] + messages * _LATENCY
    return 2.0 * size, seconds, seconds


def pipeline_message(layout: Layout, gpu: Gpu) -> tuple[float, float]:
    """(bytes, seconds) of handing a micro-batch to the next stage, which is on another node
    wherever a stage's ranks fill one."""
    if layout.pipeline == 1:
        return 0.0, 0.0
    size = layout.tokens * layout.config.model.hidden_size * layout.element / layout.sequence_split
    return size, size / link_of(gpu, layout.world_size)[1] + _LATENCY


def pipeline_transfer(layout: Layout, gpu: Gpu) -> Transfer:
    """All messages of a step, each way; the interleaved schedule hides them but at its ends."""
    size, seconds = pipeline_message(layout, gpu)
    number = 2 * layout.micro_batches * layout.virtual if size else 0
    waits = 2 * (layout.pipeline - 1) + (number if layout.virtual == 1 else 0)
    name = link_of(gpu, layout.world_size)[0]
    return Transfer("pipeline", name, size * number, seconds * number, seconds * waits)


def data_transfer(
    layout: Layout, gpu: Gpu, stage: int, forward: float, backward: float
) -> Transfer:
    """Gradients scattered, updated parameters gathered, over the ranks of the optimizer.

    Args:
        layout: the layout.
        gpu: the devices.
        stage: whose parameters.
        forward: seconds of a micro-batch's forward pass, behind which the gather hides.
        backward: of its backward pass, behind which the scatter hides.
    """
    ranks, parallel = layout.optimizer_ranks, layout.config.parallel
    parameters, in_fp8 = layout.parameters(stage), layout.kept_in_fp8(stage)
    link, rate = link_of(gpu, layout.tensor * ranks)
    gradient = 4 if layout.config.precision.accumulate_allreduce_grads_in_fp32 else 2
    share = (ranks - 1) / ranks
    scatter = gradient * parameters * share / rate
    gathered = layout.element * (parameters - in_fp8) + in_fp8
    gather = gathered * share / rate
    others = _joined_with_last_bucket(layout, stage) if in_fp8 else 0
    last = min((_BUCKET + others) / max(parameters, 1), 1.0) if ranks > 1 else 0.0
    front = _BUCKET * (1 if in_fp8 else layout.element) + layout.element * others
    first = min(front / max(gathered, 1), 1.0) if ranks > 1 else 0.0
    hidden = min(scatter * (1 - last), backward) if parallel.overlap_grad_reduce else 0.0
    hidden += min(gather * (1 - first), forward) if parallel.overlap_param_gather else 0.0
    seconds = scatter + gather
    size = (gradient * parameters + gathered) * share
    return Transfer("data", link, size, seconds, seconds - hidden)


def _joined_with_last_bucket(layout: Layout, stage: int) -> int:
    """Parameters that megatron reduces and gathers with the model's first ones where others are in
    FP8: head, norms and the like, wherever they are. (The embedding is there in any case.)"""
    model = layout.config.model
    embedding = model.vocab_size * model.hidden_size // layout.tensor if stage == 0 else 0
    return layout.parameters(stage) - layout.kept_in_fp8(stage) - embedding


def embedding_seconds(layout: Layout, gpu: Gpu) -> float:
    """The gradients of a tied matrix, summed over the first and the last stage."""
    model = layout.config.model
    if layout.pipeline == 1 or not model.share_embeddings_and_output_weights:
        return 0.0
    size = 4 * model.vocab_size * model.hidden_size // layout.tensor
    return size / link_of(gpu, layout.world_size)[1]
