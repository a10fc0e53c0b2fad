"""A plan for people (tables), for programs (plain data), and for Slurm (a command)."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from samba_megatron.config import RunConfig
from samba_megatron.config.units import format_tokens
from samba_megatron.planning.plan import CHEAP_PARTS, USABLE, Plan
from samba_megatron.tracking.numbers import format_count

GIB = 2**30


def overrides(plan: Plan, recipe: RunConfig) -> list[str]:
    """The options that make a recipe the plan."""
    words = []
    config = plan.layout.config
    for group in ("parallel", "training", "kernels"):
        before, after = getattr(recipe, group), getattr(config, group)
        for field in dataclasses.fields(after):
            value = getattr(after, field.name)
            if value == getattr(before, field.name) or _does_not_matter(config, field.name):
                continue
            words += [f"--{group}.{field.name}", _as_text(value)]
    return words


def _as_text(value: Any) -> str:
    """As the command line reads it."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _does_not_matter(config: RunConfig, name: str) -> bool:
    granularity = config.parallel.recompute_granularity
    if name == "recompute_modules":
        return granularity != "selective"
    return name in ("recompute_method", "recompute_num_layers") and granularity != "full"


def submit_command(plan: Plan, recipe: RunConfig, arguments: Sequence[str], tokens: int) -> str:
    """The line that submits the plan.

    Args:
        plan: the one to submit.
        recipe: the configuration without the plan's choices.
        arguments: what the configuration was read from.
        tokens: of the run.
    """
    gpus = min(plan.layout.world_size, plan.gpu.node_gpus)
    words = ["python", "slurm/submit.py", *arguments, "--nodes", str(plan.nodes)]
    words += [
        "--gpus-per-node",
        str(gpus),
        "--time",
        "24:00:00",
        "--until-tokens",
        format_tokens(tokens),
    ]
    words += ["--run-dir", "RUN_DIR", *overrides(plan, recipe)]
    return shlex.join(words)


def record(plan: Plan, tokens: int, write_rate: float) -> dict[str, Any]:
    """Everything of a plan as plain data: bytes, seconds, counts."""
    layout, time = plan.layout, plan.time
    parallel = layout.config.parallel
    return {
        "gpu": plan.gpu.name,
        "gpus": layout.world_size,
        "fits": plan.fits,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "data_parallel_size": layout.data,
        "micro_batch_size": layout.config.training.micro_batch_size,
        "micro_batches": layout.micro_batches,
        "recompute": recomputation(plan),
        "recompute_modules": parallel.recompute_modules
        if parallel.recompute_granularity == "selective"
        else [],
        "cross_entropy": layout.config.kernels.cross_entropy,
        "memory": {**dataclasses.asdict(plan.memory), "total_bytes": plan.memory.total_bytes},
        "seconds": {
            **{key: value for key, value in vars(time).items() if key != "transfers"},
            "step": time.total,
        },
        "transfers": [dataclasses.asdict(transfer) for transfer in time.transfers],
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "mfu_of_precision": plan.mfu_of_precision,
        "tokens_per_day": 86400 * plan.tokens_per_second,
        "run": {
            "tokens": tokens,
            "days": plan.seconds_for(tokens) / 86400,
            "gpu_hours": plan.seconds_for(tokens) / 3600 * layout.world_size,
        },
        "checkpoint": {
            "bytes": plan.checkpoint_bytes,
            "write_seconds": write_seconds(plan, write_rate),
        },
    }


def write_seconds(plan: Plan, write_rate: float) -> float:
    """Seconds to write a checkpoint, every node at ``write_rate`` bytes/s."""
    return plan.checkpoint_bytes / (plan.nodes * write_rate)


def recomputation(plan: Plan) -> str:
    """What is recomputed, in a word or two; ``parts``: several results that cost little."""
    parallel = plan.layout.config.parallel
    if parallel.recompute_granularity != "selective":
        return parallel.recompute_granularity or "none"
    names: list[str] = list(parallel.recompute_modules)
    cheap = [name for name in names if name in CHEAP_PARTS]
    if len(cheap) > 1:
        names = ["parts", *(name for name in names if name not in cheap)]
    return "+".join(names)


def ranking(plans: Sequence[Plan]) -> Table:
    """The best layouts, a row each; ``batch``: sequences of a micro-batch × micro-batches."""
    table = Table(title="layouts, fastest first", title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for name in ("TP", "CP", "PP", "VPP", "DP", "batch", "recompute", "GiB", "bubble"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("s/step", "tok/s/GPU", "MFU", "a day"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        layout = plan.layout
        micro_batch = f"{layout.config.training.micro_batch_size} × {layout.micro_batches}"
        table.add_row(
            str(layout.tensor),
            str(layout.context),
            str(layout.pipeline),
            str(layout.virtual) if layout.virtual > 1 else "–",
            str(layout.data),
            micro_batch,
            recomputation(plan),
            f"{plan.memory.total_bytes / GIB:.1f}",
            f"{100 * plan.time.bubble_share:.0f} %",
            f"{plan.time.total:.3f}",
            f"{plan.tokens_per_second / layout.world_size:,.0f}",
            f"{100 * plan.mfu:.1f} %",
            format_count(86400 * plan.tokens_per_second, digits=4),
        )
    return table


def best(plan: Plan, tokens: int, write_rate: float) -> Group:
    """All that is known of one plan."""
    tables = (_memory(plan), _time(plan), _links(plan), _run(plan, tokens, write_rate))
    return Group(*(part for table in tables for part in (Text(), table)))


def _facts(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    for row in rows:
        table.add_row(*(f"  {cell}" if place == 0 else cell for place, cell in enumerate(row)))
    return table


def _memory(plan: Plan) -> Table:
    memory = plan.memory
    rows = [("weights", _gib(memory.weights)), ("gradients", _gib(memory.gradients))]
    rows.append((f"optimizer, of {plan.layout.optimizer_ranks} ranks", _gib(memory.optimizer)))
    rows += [
        (f"activations: {name}", _gib(size)) for name, size in memory.activations_by_kind.items()
    ]
    if memory.head:
        rows.append(("logits and loss", _gib(memory.head)))
    limit = f"of {plan.gpu.memory_gib:g}, {100 * USABLE:.0f} % of which may be planned with"
    rows.append(("in all", f"{_gib(memory.total_bytes)} {limit}"))
    where = f" (stage {memory.stage})" if plan.layout.pipeline > 1 else ""
    return _facts(f"memory of the fullest GPU{where}, GiB", rows)


def _time(plan: Plan) -> Table:
    time = plan.time
    parts = {
        "forward": time.forward,
        "backward": time.backward,
        "pipeline bubble": time.bubble,
        "pipeline messages": time.pipeline_messages,
        "gradients and parameters, not hidden": time.gradient_reduce,
        "optimizer": time.optimizer,
        "in all": time.total,
    }
    rows = [
        (name, f"{seconds:.3f}", f"{100 * seconds / time.total:.0f} %")
        for name, seconds in parts.items()
        if seconds
    ]
    return _facts("a step, seconds", rows)


def _links(plan: Plan) -> Table:
    table = Table(title="sent by a GPU in a step", title_justify="left", box=None)
    for name in ("", "link", "GB", "seconds", "not hidden"):
        table.add_column(name, justify="left" if name in ("", "link") else "right")
    for each in plan.time.transfers:
        seconds = f"{each.seconds:.3f}", f"{each.exposed_seconds:.3f}"
        table.add_row(f"  {each.name}", each.link, f"{each.bytes / 1e9:.2f}", *seconds)
    return table


def _run(plan: Plan, tokens: int, write_rate: float) -> Table:
    layout, seconds = plan.layout, plan.seconds_for(tokens)
    flops = f"{plan.model_flops / 1e12:.0f} TFLOP/s a GPU, MFU {100 * plan.mfu:.1f} %"
    if layout.config.precision.fp8:
        flops += f" ({100 * plan.mfu_of_precision:.1f} % of the FP8 peak)"
    rate = f"{plan.tokens_per_second / 1e6:.2f}M tokens/s, "
    rows = [
        ("speed", f"{rate}{format_count(86400 * plan.tokens_per_second, digits=4)} a day; {flops}"),
        (
            f"{format_count(tokens, digits=4)} tokens",
            f"{seconds / 86400:.1f} days, {seconds / 3600 * layout.world_size:,.0f} GPU-hours, "
            "without stops",
        ),
        (
            "checkpoint",
            f"{plan.checkpoint_bytes / 1e9:.1f} GB, {write_seconds(plan, write_rate):.1f} s at "
            f"{write_rate / 1e9:g} GB/s a node",
        ),
    ]
    return _facts("the run", rows)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"
