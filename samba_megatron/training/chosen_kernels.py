"""The kernels that a run takes: each rank chooses by what its node has, and all must agree."""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from samba_megatron.config import RunConfig
from samba_megatron.platform import distributed
from samba_megatron.platform.errors import ExitWith, UserError
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.hardware import node_name
from samba_megatron.tracking.ledger import Cause

Answer = tuple[dict[str, str], str, str]
"""Of a rank: its kernels, its node, and why they cannot serve."""


def agree_on_kernels(config: RunConfig) -> dict[str, str]:
    """:func:`chosen_kernels`, the same on every rank; every rank must call it.

    A node where a package does not load would build other layers: its parameters would lie
    elsewhere in the buffers that ranks add up.

    Raises:
        UserError: a kernel cannot serve this run, or ranks on several nodes take others.
        ExitWith: with code BAD_NODE, where it is one node of several.
    """
    own: dict[str, str] = {}
    refusal = ""
    try:
        own = chosen_kernels(config)
    except UserError as error:
        refusal = str(error)
    texts = distributed.gather_text(json.dumps([own, node_name(), refusal]))
    answers: list[Answer] = [json.loads(text) for text in texts]
    sentence, odd = _disagreement(answers)
    if not sentence:
        return own
    nodes = {answers[rank][1] for rank in odd}
    rest = {node for rank, (_, node, _) in enumerate(answers) if rank not in odd}
    if len(nodes) == 1 and len(odd) < len(answers) / 2 and not nodes & rest:
        raise ExitWith(ExitCode.BAD_NODE, sentence, Cause.BAD_NODE, nodes.pop())
    raise UserError(sentence)


def _disagreement(answers: Sequence[Answer]) -> tuple[str, list[int]]:
    """What keeps ranks from running together (empty if nothing does), and the ranks it is about."""
    refusing = [rank for rank, (_, _, refusal) in enumerate(answers) if refusal]
    if refusing:
        _, node, refusal = answers[refusing[0]]
        where = f"rank {refusing[0]} on {node}: " if len(refusing) < len(answers) else ""
        return where + refusal, refusing
    # In the order in which they are chosen: what a lacking package changes first comes first.
    for name in dict.fromkeys(name for kernels, _, _ in answers for name in kernels):
        taken = [kernels.get(name, "none") for kernels, _, _ in answers]
        usual, _ = Counter(taken).most_common(1)[0]
        odd = [rank for rank, choice in enumerate(taken) if choice != usual]
        if odd:
            sentence = (
                f"rank {odd[0]} on {answers[odd[0]][1]} has {name} {taken[odd[0]]}, and others "
                f"have {usual}: mend what that node lacks (make doctor there says it), or choose "
                "what all have"
            )
            return sentence, odd
    return "", []


def chosen_kernels(config: RunConfig) -> dict[str, str]:
    """Which implementation computes what on this rank: ``transformer_impl`` and the operations.

    Raises:
        UserError: a kernel that is named in the configuration cannot serve this run.
    """
    from samba_megatron.model.backend import choose_implementation
    from samba_megatron.model.transformer_config import params_dtype
    from samba_megatron.training.optimizer import adam_implementation

    device, precision = distributed.device_type(), config.precision
    implementation = choose_implementation(config.kernels.transformer_impl, device)
    kernels = {
        "transformer_impl": implementation,
        "params_dtype": str(params_dtype(config)).removeprefix("torch."),
        "fp8": f"{precision.fp8} ({precision.fp8_recipe})" if precision.fp8 else "off",
        "adam": adam_implementation(),
        "collectives": "nccl" if device == "cuda" else "gloo",
    }
    return kernels | _op_backends(config, implementation)


def _op_backends(config: RunConfig, implementation: str) -> dict[str, str]:
    """The kernels that the dispatch takes for this run's tensors; a forced one that cannot serve
    them is refused here, before the first step."""
    from samba_megatron.model.transformer_config import params_dtype, tokens_at_once
    from samba_megatron.ops.causal_conv1d.dispatch import CAUSAL_CONV1D
    from samba_megatron.ops.linear_cross_entropy.dispatch import LINEAR_CROSS_ENTROPY
    from samba_megatron.ops.registry import AUTO, Request
    from samba_megatron.ops.selective_scan.dispatch import SELECTIVE_SCAN
    from samba_megatron.ops.swiglu.dispatch import SWIGLU
    from samba_megatron.ops.windowed_attention.dispatch import WINDOWED_ATTENTION

    model, kernels = config.model, config.kernels
    channels = model.d_inner // config.parallel.tensor_model_parallel_size
    documents = ["reset"] if config.data.reset_at_document_boundaries else []
    shared = config.parallel.context_parallel_size > 1
    carried = [*documents, "carry"] if shared else documents
    before = ["initial_state"] if shared and not documents else documents
    borrowed = [*documents, "halo"] if shared else documents

    def request(features: Sequence[str] = (), width: int = channels) -> Request:
        return Request(
            device=distributed.device_type(),
            dtype=params_dtype(config),
            features=frozenset(features),
            sizes={
                "channels": channels,
                "width": model.d_conv,
                "d_state": model.d_state,
                "head_dim": model.head_dim,
                "row": model.hidden_size,
                "span": width * tokens_at_once(config),
            },
        )

    chosen = {}
    if "M" in model.hybrid_layer_pattern:
        chosen["selective_scan"] = SELECTIVE_SCAN.choose(
            kernels.selective_scan, request(carried)
        ).name
    if "M" in model.hybrid_layer_pattern or model.short_convolution:
        # It reads the first half of a joined projection.
        asked = request(before, 2 * channels)
        chosen["causal_conv1d"] = CAUSAL_CONV1D.choose(kernels.causal_conv1d, asked).name
    if "-" in model.hybrid_layer_pattern:
        chosen["swiglu"] = SWIGLU.choose(kernels.swiglu, request()).name
    chosen["rms_norm"] = _norm(config, implementation, request())
    chosen |= _rotary(config, implementation, request())
    if kernels.cross_entropy == "chunked":
        asked = request(["vocabulary_parallel", "main_grad"])
        chosen["cross_entropy"] = f"chunked ({LINEAR_CROSS_ENTROPY.choose(AUTO, asked).name})"
    if implementation == "transformer_engine" and not (documents or shared):
        return {**chosen, "attention": "transformer_engine"}
    attention = WINDOWED_ATTENTION.choose(kernels.windowed_attention, request(borrowed)).name
    return {**chosen, "attention": attention}


def _norm(config: RunConfig, implementation: str, request: Any) -> str:
    from samba_megatron.model.backend import has_own_norm
    from samba_megatron.ops.rms_norm.dispatch import RMS_NORM

    if implementation == "transformer_engine" and not has_own_norm(config):
        return "transformer_engine"
    if config.precision.fp32_residual_connection:
        return "torch"
    return RMS_NORM.choose(config.kernels.rms_norm, request).name


def _rotary(config: RunConfig, implementation: str, request: Any) -> dict[str, str]:
    from samba_megatron.model.rotary import splits_and_rotates
    from samba_megatron.model.transformer_config import counts_rotary_in_32_bits
    from samba_megatron.ops.rotary.dispatch import ROTARY

    model, tensor = config.model, config.parallel.tensor_model_parallel_size
    if not set("*F") & set(model.hybrid_layer_pattern) or model.position_embedding_type != "rope":
        return {}
    if splits_and_rotates(model, config.kernels, tensor):
        return {"rotary": ROTARY.choose(config.kernels.rotary, request).name}
    theirs = implementation == "transformer_engine" and counts_rotary_in_32_bits(config)
    return {"rotary": "transformer_engine" if theirs else "megatron"}
