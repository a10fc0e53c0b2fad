"""Which layout a run should have on a number of GPUs: every legal one, judged by memory and time.

What is legal the rules of the configuration say (``config/rules``); here layouts are only proposed.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from samba_megatron.config import RunConfig
from samba_megatron.config.checks import violations
from samba_megatron.config.pattern import MLP, layer_symbols
from samba_megatron.config.rules.layout import (
    legal_tensor_sizes,
    recomputation,
    sequence_pieces,
)
from samba_megatron.config.rules.situation import Situation, divisors
from samba_megatron.model.samba import flops_per_token
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import MemoryEstimate, checkpoint_bytes, estimate
from samba_megatron.planning.step_time import StepModel, StepTime
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.hardware import Gpu

USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's, NCCL's, and torch's blocks that do not fit together."""
_MOST_PIPELINE = 16
_VIRTUAL = (2, 3, 4, 8)
_CONTEXT = (1, 2, 4, 8)
_LEAST_PART = 4096
"""Context parallelism is not proposed for shorter parts of a sequence: it would only send more."""
CHEAP_PARTS = ("mlp_act", "conv1d", "dt_proj", "layernorm")
"""Of ``recompute_modules``, results within layers that are proposed together, as they cost next to
nothing to compute again."""


@dataclass(frozen=True)
class Plan:
    """A layout, and what comes of it."""

    layout: Layout
    gpu: Gpu
    memory: MemoryEstimate
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether the fullest device holds it."""
        return self.memory.total_bytes <= usable_bytes(self.gpu)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        config = self.layout.config
        return config.training.global_batch_size * config.data.sequence_length / self.time.total

    @property
    def model_flops(self) -> float:
        """FLOP/s of a device, without recomputation."""
        config = self.layout.config
        flops = flops_per_token(config.model, config.data.sequence_length)
        return self.tokens_per_second * flops.model / self.layout.world_size

    @property
    def mfu(self) -> float:
        """Of the bf16 peak."""
        return self.model_flops / (self.gpu.tflops["bf16"] * 1e12)

    @property
    def mfu_of_precision(self) -> float:
        """Of the peak of the precision used."""
        precision = "fp8" if self.layout.config.precision.fp8 else "bf16"
        return self.model_flops / (self.gpu.tflops.get(precision, self.gpu.tflops["bf16"]) * 1e12)

    @property
    def nodes(self) -> int:
        """Nodes of the run."""
        return -(-self.layout.world_size // self.gpu.node_gpus)

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint."""
        return checkpoint_bytes(self.layout.config)

    def seconds_for(self, tokens: float) -> float:
        """Training alone: no stops, validations or saves."""
        return tokens / self.tokens_per_second


def usable_bytes(gpu: Gpu) -> float:
    """What a run may take of a device."""
    return USABLE * gpu.memory_gib * 2**30


def judge(config: RunConfig, gpus: int, gpu: Gpu) -> Plan:
    """What comes of a configuration as it is."""
    layout = Layout(config, gpus)
    return Plan(layout, gpu, estimate(config, gpus), StepModel(layout, gpu).step())


def search(config: RunConfig, gpus: int, gpu: Gpu) -> list[Plan]:
    """All legal layouts, those that fit before the others, the fastest first.

    Layouts differ in tensor (within a node), pipeline, virtual and context parallelism, micro-batch
    and recomputation; model, data, precision and batch are the configuration's. Of those that
    differ in recomputation alone, one that another beats in memory and time is left out. Where
    nothing fits they are there with the chunked head too, unless the configuration names another.

    Raises:
        UserError: there is none.
    """
    _check_count(config, gpus, gpu)
    found = _judged(config, gpus, gpu)
    if not found:
        raise UserError(_why_none(config, gpus, gpu))
    if config.kernels.cross_entropy == "auto" and not any(plan.fits for plan in found):
        kernels = dataclasses.replace(config.kernels, cross_entropy="chunked")
        found += _judged(dataclasses.replace(config, kernels=kernels), gpus, gpu)
    return sorted(
        found,
        key=lambda plan: (
            not plan.fits,
            plan.time.total if plan.fits else plan.memory.total_bytes,
        ),
    )


def _judged(config: RunConfig, gpus: int, gpu: Gpu) -> list[Plan]:
    """Every legal layout with each recomputation that is worth it."""
    return [
        plan
        for candidates in _legal(config, gpus, gpu)
        for plan in _worth_it([judge(candidate, gpus, gpu) for candidate in candidates])
    ]


def _worth_it(plans: list[Plan]) -> list[Plan]:
    """Those that no other one equals in both memory and time, fastest first."""
    kept: list[Plan] = []
    for plan in sorted(plans, key=lambda each: (each.time.total, each.memory.total_bytes)):
        if not kept or plan.memory.total_bytes < kept[-1].memory.total_bytes:
            kept.append(plan)
    return kept


def _check_count(config: RunConfig, gpus: int, gpu: Gpu) -> None:
    node = gpu.node_gpus
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}: it must be 1 or more")
    if gpus > node and gpus % node:
        below = gpus // node * node
        raise UserError(
            f"--gpus {gpus} is not a number of whole nodes of {node} {gpu.name}: use {below} or "
            f"{below + node}"
        )
    if config.precision.fp8 and "fp8" not in gpu.tflops:
        raise UserError(
            f"precision.fp8 is {config.precision.fp8}, and the {gpu.name} has no FP8: set it to "
            "null, or plan for another GPU"
        )


def _legal(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[list[RunConfig]]:
    """The proposals that the rules let pass, each with every recomputation that they let pass."""
    choices = _recomputations(config)
    for proposal in _proposals(config, gpus, gpu):
        if not problems(proposal, gpus):
            candidates = [with_fields(proposal, choice) for choice in choices]
            yield [
                candidate
                for candidate in candidates
                if not [*sequence_pieces(Situation(candidate, gpus, "cuda", None, None))]
            ]


def _recomputations(config: RunConfig) -> list[dict[str, Any]]:
    """Fields of ``parallel``: nothing, results within layers, layers; no name that this model or
    its precision has no use for."""

    def is_legal(fields: dict[str, Any]) -> bool:
        situation = Situation(with_fields(config, fields), 1, "cuda", None, None)
        return not [*recomputation(situation)]

    cheap = [name for name in CHEAP_PARTS if is_legal(_selective(name))]
    choices = [
        {"recompute_granularity": None},
        _selective(*cheap),
        _selective(*cheap, "scan"),
        _selective("mamba"),
        _selective("mamba", "mlp"),
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ]
    return [choice for choice in choices if is_legal(choice)]


def _selective(*names: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(names)}


def problems(config: RunConfig, gpus: int) -> list[str]:
    """What the rules say; a plan needs no data yet."""
    data = config.data
    if not data.data_path and not data.blend_file:
        data = dataclasses.replace(data, data_path=["data"])
    return violations(dataclasses.replace(config, data=data), gpus, "cuda")


def with_fields(
    config: RunConfig, parallel: dict[str, Any], micro_batch_size: int | None = None
) -> RunConfig:
    """The configuration with other fields of ``parallel``, and another micro-batch."""
    training = config.training
    if micro_batch_size is not None:
        training = dataclasses.replace(training, micro_batch_size=micro_batch_size)
    return dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, **parallel), training=training
    )


def _proposals(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[RunConfig]:
    situation = Situation(config, gpus, "cuda", None, None)
    symbols = layer_symbols(config.model.hybrid_layer_pattern)
    blocks = symbols.count(MLP) or len(symbols)
    for tensor in legal_tensor_sizes(situation):
        if tensor > gpu.node_gpus or gpu.node_gpus % tensor or gpus % tensor:
            continue
        for pipeline in divisors(gpus // tensor):
            if pipeline > min(blocks, _MOST_PIPELINE):
                break
            for virtual in _virtual_sizes(pipeline, blocks):
                for context in _context_sizes(config, gpus // (tensor * pipeline)):
                    fields = {
                        "tensor_model_parallel_size": tensor,
                        "sequence_parallel": tensor > 1,
                        "pipeline_model_parallel_size": pipeline,
                        "virtual_pipeline_model_parallel_size": virtual,
                        "context_parallel_size": context,
                    }
                    size = tensor * pipeline * context
                    for micro_batch in _micro_batches(config, gpus // size):
                        yield with_fields(config, fields, micro_batch)


def _virtual_sizes(pipeline: int, blocks: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    return [None, *(size for size in _VIRTUAL if size <= blocks // pipeline)]


def _context_sizes(config: RunConfig, ranks: int) -> list[int]:
    length = config.data.sequence_length
    return [s for s in _CONTEXT if ranks % s == 0 and (s == 1 or length // s >= _LEAST_PART)]


def _micro_batches(config: RunConfig, data: int) -> list[int]:
    """Powers of two that a rank's share of the batch allows."""
    share = config.training.global_batch_size // data
    return [1 << power for power in range(share.bit_length()) if share % (1 << power) == 0]


def _why_none(config: RunConfig, gpus: int, gpu: Gpu) -> str:
    """What stands against the simplest layout, and which numbers of GPUs have one."""
    one: dict[str, Any] = {"tensor_model_parallel_size": 1, "sequence_parallel": False}
    one |= {"pipeline_model_parallel_size": 1, "virtual_pipeline_model_parallel_size": None}
    found = problems(with_fields(config, one, 1), gpus)
    own = problems(config, config.parallel.pipeline_model_parallel_size)
    reason = (found or own or ["no proposal passes the rules"])[0]
    step = gpu.node_gpus if gpus > gpu.node_gpus else 1
    below = _nearest(config, range(gpus - step, 0, -step), gpu)
    above = _nearest(config, range(gpus + step, 2 * gpus + step, step), gpu)
    others = " or ".join(str(count) for count in (below, above) if count)
    remedy = f"; {others} GPUs would do" if others else ""
    return f"{gpus} {gpu.name} have no legal layout for this run: {reason}{remedy}"


def _nearest(config: RunConfig, counts: range, gpu: Gpu) -> int | None:
    return next((count for count in counts if next(_legal(config, count, gpu), None)), None)
