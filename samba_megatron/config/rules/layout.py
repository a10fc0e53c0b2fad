"""Rules of the layout: how a model and its sequences lie on a number of processes."""

from collections.abc import Iterator, Sequence
from math import gcd

from samba_megatron.config.model import ModelConfig
from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from samba_megatron.config.pattern import split_stages
from samba_megatron.config.rules.situation import Situation, divisors, nearest, not_multiple
from samba_megatron.platform.errors import UserError

TENSOR = "parallel.tensor_model_parallel_size"
PIPELINE = "parallel.pipeline_model_parallel_size"
VIRTUAL = "parallel.virtual_pipeline_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"


def _split_sizes(situation: Situation) -> dict[str, int]:
    """The sizes that tensor parallelism divides in this model, by the fields they come from."""
    model = situation.config.model
    sizes = {"model.vocab_size": model.vocab_size}
    if situation.has_attention:
        sizes["model.num_attention_heads"] = model.num_attention_heads
    if "M" in situation.layers:
        sizes["the Mamba width (model.expand × model.hidden_size)"] = model.d_inner
    if "-" in situation.layers:
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size
    return sizes


def _query_groups_fit(model: ModelConfig, tensor: int) -> bool:
    """Whether megatron-core can lay the key/value heads over ``tensor`` ranks.

    Each rank has whole heads, or several ranks share one: then the fused projection, whose rows
    are split evenly before they are gathered again, must have a multiple of ``tensor`` rows.
    """
    groups = model.kv_heads
    if groups % tensor == 0:
        return True
    rows = (model.num_attention_heads + 2 * groups) * model.head_dim
    return tensor % groups == 0 and rows % tensor == 0


def legal_tensor_sizes(situation: Situation) -> list[int]:
    """The tensor-parallel sizes that fit all sizes of the model, ascending."""
    common = divisors(gcd(*_split_sizes(situation).values()))
    if not situation.has_attention:
        return common
    return [size for size in common if _query_groups_fit(situation.config.model, size)]


def tensor_parallel_sizes(situation: Situation) -> Iterator[str]:
    """Tensor parallelism divides every size that it splits."""
    tensor = situation.config.parallel.tensor_model_parallel_size
    together = nearest(tensor, legal_tensor_sizes(situation))
    for name, size in _split_sizes(situation).items():
        if size % tensor:
            allowed = nearest(tensor, divisors(size)[1:])
            remedy = f"{allowed} do" if allowed else "nothing over 1 does"
            if name == "model.vocab_size":
                padded = (size // tensor + 1) * tensor
                remedy += f", or pad the vocabulary to {padded}"
            yield (
                f"{TENSOR} {tensor} does not divide {name} {size}: {remedy} "
                f"(the sizes of this model together allow {together})"
            )


def tensor_parallel_query_groups(situation: Situation) -> Iterator[str]:
    """Tensor parallelism splits the key/value heads, or evenly shares them."""
    model = situation.config.model
    tensor = situation.config.parallel.tensor_model_parallel_size
    if not situation.has_attention or model.num_attention_heads % tensor:
        return
    if not _query_groups_fit(model, tensor):
        legal = [d for d in divisors(model.num_attention_heads) if _query_groups_fit(model, d)]
        yield (
            f"{TENSOR} {tensor} does not fit model.num_query_groups {model.kv_heads}: it must "
            "divide it, or be a multiple that also divides the rows of the query/key/value "
            f"projection: use {nearest(tensor, legal)}"
        )


def short_convolution(situation: Situation) -> Iterator[str]:
    """The taps on keys and values follow whole heads."""
    model = situation.config.model
    tensor = situation.config.parallel.tensor_model_parallel_size
    if situation.has_attention and model.short_convolution and model.kv_heads % tensor:
        yield (
            f"{TENSOR} {tensor} does not divide model.num_query_groups {model.kv_heads}, as "
            f"model.short_convolution needs: use {nearest(tensor, divisors(model.kv_heads))}"
        )


def sequence_parallel(situation: Situation) -> Iterator[str]:
    """Sequence parallelism needs ranks to split over, and lengths that they divide."""
    parallel = situation.config.parallel
    tensor = parallel.tensor_model_parallel_size
    if not parallel.sequence_parallel:
        return
    if tensor == 1:
        yield (
            f"parallel.sequence_parallel needs {TENSOR} over 1, and it is 1: set it to false, or "
            f"use {nearest(1, legal_tensor_sizes(situation)[1:]) or 'another width'} ranks"
        )
    if parallel.context_parallel_size == 1:
        yield from _pieces(situation, tensor, f"{TENSOR} {tensor}, as sequence_parallel needs")


def _pieces(situation: Situation, number: int, because: str) -> Iterator[str]:
    """Every sequence makes so many equal pieces."""
    config = situation.config
    yield from not_multiple("data.sequence_length", config.data.sequence_length, number, because)
    for length in config.validation.sequence_lengths:
        yield from not_multiple("validation.sequence_lengths:", length, number, because)


def _attention_with_a_halo(situation: Situation, because: str) -> Iterator[str]:
    """The kernel takes keys before the queries' own."""
    kernel = situation.config.kernels.windowed_attention
    if kernel == "transformer_engine" and set(situation.layers) & set("*F"):
        yield (
            f"kernels.windowed_attention transformer_engine takes no keys of earlier pieces, as "
            f"{because} needs: use auto or flash_attn"
        )


def sequence_pieces(situation: Situation) -> Iterator[str]:
    """Pieces are equal, and follow one another on the same ranks."""
    config = situation.config
    parallel, number = config.parallel, config.parallel.sequence_pieces
    if number == 1:
        return
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(parallel, name) > 1:
            yield (
                f"parallel.sequence_pieces {number} does not go with parallel.{name} "
                f"{getattr(parallel, name)}: set one of them to 1"
            )
    pieces, because = number, f"parallel.sequence_pieces {number}"
    if parallel.sequence_parallel:
        tensor = parallel.tensor_model_parallel_size
        pieces, because = number * tensor, f"{because} × {TENSOR} {tensor} = {number * tensor}"
    length = config.data.sequence_length
    yield from not_multiple("data.sequence_length", length, pieces, because)
    for other in config.validation.sequence_lengths:
        if other > length // number and other % (length // number):
            yield (
                f"validation.sequence_lengths: {other} is neither one piece of {length // number} "
                f"tokens (data.sequence_length / parallel.sequence_pieces) nor several whole ones"
            )
    yield from _attention_with_a_halo(situation, because)
    if parallel.sequence_piece_gradients == "exact" and parallel.recomputes_layers:
        yield (
            "parallel.sequence_piece_gradients exact computes every piece again anyway: set "
            "parallel.recompute_granularity to null and use more pieces, or use truncated"
        )
    scan = config.kernels.selective_scan
    if "M" in situation.layers and scan == "mamba_ssm":
        yield (
            f"parallel.sequence_pieces {number} needs a scan that goes on from a state, and "
            "kernels.selective_scan mamba_ssm does not: use auto, fused or torch"
        )


def context_parallel(situation: Situation) -> Iterator[str]:
    """Every rank has as many positions of a sequence, and a scan that takes its state from the
    rank before."""
    config = situation.config
    parallel, number = config.parallel, config.parallel.context_parallel_size
    if number == 1:
        return
    pieces, because = number, f"{CONTEXT} {number}"
    if parallel.sequence_parallel:
        tensor = parallel.tensor_model_parallel_size
        pieces = number * tensor
        because += f" × {TENSOR} {tensor} = {pieces} (with sequence_parallel)"
    yield from _pieces(situation, pieces, because)
    yield from _attention_with_a_halo(situation, because)
    scan = config.kernels.selective_scan
    if "M" in situation.layers and scan in ("mamba_ssm", "reference"):
        yield (
            f"{CONTEXT} {number} needs a scan that goes on from the rank before, and "
            f"kernels.selective_scan {scan} does not: use auto, fused or torch"
        )


def processes(situation: Situation) -> Iterator[str]:
    """The processes make whole groups that work on a sequence together."""
    parallel = situation.config.parallel
    replica, world = situation.replica_size, situation.world_size
    if world % replica:
        below = world // replica * replica
        counts = f"{below} or {below + replica}" if below else str(replica)
        context = parallel.context_parallel_size
        shared = f" × {CONTEXT} {context}" if context > 1 else ""
        yield (
            f"{TENSOR} {parallel.tensor_model_parallel_size} × {PIPELINE} "
            f"{parallel.pipeline_model_parallel_size}{shared} = {replica} "
            f"does not divide the {world} "
            f"process{'es' if world > 1 else ''} of this run: start {counts}"
        )


def devices(situation: Situation) -> Iterator[str]:
    """Every process has a GPU of its own."""
    available, started = situation.available_devices, situation.local_world_size
    if situation.device_type != "cuda" or available is None or started is None:
        return
    if started > available:
        yield (
            f"{started} processes were started on a machine with {available} "
            f"GPU{'s' if available != 1 else ''}: start one for each GPU"
        )


def pipeline_cuts(situation: Situation) -> Iterator[str]:
    """The layer pattern makes as many model chunks as the layout has."""
    parallel = situation.config.parallel
    try:
        split_stages(
            situation.config.model.hybrid_layer_pattern,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
        )
    except UserError as error:
        yield str(error)


def virtual_pipeline(situation: Situation) -> Iterator[str]:
    """Interleaving needs stages to interleave, and more than one chunk for each."""
    parallel = situation.config.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is None:
        return
    if parallel.pipeline_model_parallel_size == 1:
        yield f"{VIRTUAL} {virtual} needs {PIPELINE} over 1, and it is 1: unset the former"
    if virtual == 1:
        yield f"{VIRTUAL} is 1: unset it, or use 2 or more"


def gradient_overlap(situation: Situation) -> Iterator[str]:
    """Parameters are gathered bucket by bucket only where gradients are reduced so."""
    parallel = situation.config.parallel
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather true needs parallel.overlap_grad_reduce true, and it is "
            "false: give both the same value"
        )


def recomputation(situation: Situation) -> Iterator[str]:
    """What shall be recomputed is there."""
    parallel = situation.config.parallel
    if parallel.recompute_granularity == "full":
        most = len(situation.layers)
        if parallel.recompute_num_layers > most:
            yield (
                f"parallel.recompute_num_layers {parallel.recompute_num_layers} is over the "
                f"{most} layers of the model: use 1 to {most}"
            )
    elif parallel.recompute_granularity == "selective":
        symbols = {"mamba": "M", "attention": "*F", "mlp": "-"} | RECOMPUTABLE_PARTS
        present = [kind for kind, any_of in symbols.items() if set(any_of) & set(situation.layers)]
        modules = parallel.recompute_modules
        if not modules:
            yield (
                "parallel.recompute_modules is empty with recompute_granularity selective: name "
                f"{', '.join(present)} or some of them"
            )
        for kind in modules:
            if kind not in present:
                yield (
                    f"parallel.recompute_modules names {kind}, and the model has no such layer: "
                    f"it has {', '.join(present)}"
                )
        yield from _recomputed_twice(modules)
        precision = situation.config.precision
        if precision.fp8:
            yield from _kept_in_fp8(modules)
        if "layernorm" in modules and precision.fp32_residual_connection:
            yield (
                "parallel.recompute_modules names layernorm, and with "
                "precision.fp32_residual_connection that would keep the norms' inputs in fp32, "
                "twice what it saves: leave it out"
            )


def _recomputed_twice(modules: Sequence[str]) -> Iterator[str]:
    """A layer that is computed again whole has its results computed again with it."""
    for whole, parts in {"mamba": ("conv1d", "dt_proj", "scan"), "mlp": ("mlp_act",)}.items():
        for part in parts:
            if whole in modules and part in modules:
                yield (
                    f"parallel.recompute_modules names {whole} and {part}, and {whole} computes "
                    f"that again already: name one of them"
                )


def _kept_in_fp8(modules: Sequence[str]) -> Iterator[str]:
    """An FP8 linear keeps its input in FP8, not the result in bf16."""
    instead = {"mlp_act": "leave it out", "layernorm": "leave it out", "scan": "use mamba"}
    for part, remedy in instead.items():
        if part in modules:
            yield (
                f"parallel.recompute_modules names {part}, and with precision.fp8 the linear that "
                f"reads its result keeps a copy of its own, a byte a number: {remedy}"
            )


RULES = (
    processes,
    devices,
    tensor_parallel_sizes,
    tensor_parallel_query_groups,
    short_convolution,
    sequence_parallel,
    context_parallel,
    sequence_pieces,
    pipeline_cuts,
    virtual_pipeline,
    gradient_overlap,
    recomputation,
)
