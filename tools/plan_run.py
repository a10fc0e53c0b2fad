"""Plans a run before it is started: its layout, memory, speed, days and GPU-hours.

    python tools/plan_run.py --config samba_3.8b --gpus 1024 --gpu h200

Every legal layout (tensor, context, pipeline, virtual pipeline, data, micro-batch, recomputation)
is judged by the memory of its fullest GPU and the time of a step; needs no GPU. Options with a dot
are laid over the recipe, as with pretrain_samba.py; docs/planning.md has the errors as measured.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from samba_megatron.config import RunConfig  # noqa: E402
from samba_megatron.config.load import parse_run_config  # noqa: E402
from samba_megatron.config.units import parse_tokens  # noqa: E402
from samba_megatron.platform.errors import UserError, run_command  # noqa: E402

if TYPE_CHECKING:
    from samba_megatron.planning.plan import Plan
    from samba_megatron.platform.hardware import Gpu

_SEVERAL = 10
_ANY_TOKENS = 10**9
"""A run without a length is told its speed by these."""


def main() -> None:
    """Runs the command."""
    arguments, rest = parse_arguments()
    from samba_megatron.planning import plan, report

    words = [word for recipe in arguments.config for word in ("--config", recipe)] + rest
    config = parse_run_config(words, prog="plan_run.py")
    gpu = described_gpu(arguments)
    tokens = run_tokens(arguments, config)
    plans = plan.search(config, arguments.gpus, gpu)
    if not plans[0].fits:
        raise UserError(does_not_fit(plans[0]))
    plans = [each for each in plans if each.fits][: arguments.top]
    rate = arguments.storage_rate * 1e9
    if arguments.json:
        print(json.dumps([report.record(each, tokens, rate) for each in plans], indent=1))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{config.name} on {arguments.gpus} {gpu.name}\n", markup=False)
    console.print(report.ranking(plans))
    if has_another_head(plans[0], config):
        console.print("\nall with kernels.cross_entropy chunked: none fits without", markup=False)
    console.print(f"\nthe recipe as it is: {as_it_is(config, arguments.gpus, gpu)}", markup=False)
    console.print(report.best(plans[0], tokens, rate))
    command = report.submit_command(plans[0], config, words, tokens)
    console.print(f"\nsubmit the first:\n  {command}", markup=False)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, options of the run)."""
    parser = argparse.ArgumentParser(
        usage="plan_run.py --config RECIPE --gpus N --gpu NAME [--tokens 3.2T] [--top 10] "
        "[--json] [--GROUP.FIELD VALUE ...]",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", required=True, help="recipe; may be repeated")
    add("--gpus", type=int, required=True, help="number of GPUs of the whole run")
    add("--gpu", required=True, help="their kind: a100, h100, h200, b200, gb200, …")
    add("--tokens", help="length of the run, as 3.2T; the recipe's where it has one")
    add("--top", type=int, default=_SEVERAL, help="layouts to show")
    add("--gpus-per-node", type=int, help="where your nodes differ from the usual")
    add("--network-rate", type=float, help="GB/s a GPU to other nodes, where yours differs")
    add("--storage-rate", type=float, default=2.0, help="GB/s that a node writes to the storage")
    add("--json", action="store_true", help="plain data instead of tables")
    arguments, rest = parser.parse_known_args()
    for name in ("top", "storage_rate", "gpus_per_node", "network_rate"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {value}: it must be more than 0")
    return arguments, rest


def described_gpu(arguments: argparse.Namespace) -> "Gpu":
    """The GPU of the table, with what the command line says of its surroundings."""
    from samba_megatron.platform.hardware import gpu_named

    gpu = gpu_named(arguments.gpu)
    return dataclasses.replace(
        gpu,
        node_gpus=arguments.gpus_per_node or gpu.node_gpus,
        network=arguments.network_rate or gpu.network,
    )


def run_tokens(arguments: argparse.Namespace, config: RunConfig) -> int:
    """Tokens of the run that is planned."""
    if arguments.tokens:
        try:
            return max(parse_tokens(arguments.tokens), 1)
        except ValueError as error:
            raise UserError(f"--tokens: {error}") from None
    training = config.training
    if training.train_tokens is not None:
        return training.train_tokens
    steps = training.train_steps
    return (
        steps * training.global_batch_size * config.data.sequence_length if steps else _ANY_TOKENS
    )


def as_it_is(config: RunConfig, gpus: int, gpu: "Gpu") -> str:
    """What comes of the configuration's own layout."""
    from samba_megatron.planning import plan

    if found := plan.problems(config, gpus):
        return found[0]
    own = plan.judge(config, gpus, gpu)
    room = "" if own.fits else ": too much"
    size = f"{own.memory.total_bytes / 2**30:.1f} GiB{room}"
    return f"{own.time.total:.3f} s a step, MFU {100 * own.mfu:.1f} %, {size}"


def has_another_head(plan: "Plan", config: RunConfig) -> bool:
    """Whether the search had to change the head that the configuration names."""
    return plan.layout.config.kernels.cross_entropy != config.kernels.cross_entropy


def does_not_fit(nearest: "Plan") -> str:
    """What comes nearest, and what it lacks."""
    from samba_megatron.planning import plan, report

    needed, usable = nearest.memory.total_bytes, plan.usable_bytes(nearest.gpu)
    layout = nearest.layout
    return (
        f"no layout fits {layout.world_size} {nearest.gpu.name}: the nearest (TP {layout.tensor}, "
        f"CP {layout.context}, PP {layout.pipeline}, micro-batch "
        f"{layout.config.training.micro_batch_size}, recomputing {report.recomputation(nearest)}, "
        f"kernels.cross_entropy {layout.config.kernels.cross_entropy}) "
        f"needs {needed / 2**30:.1f} GiB of {usable / 2**30:.1f}, {(needed - usable) / 2**30:.1f} "
        "too much: use more GPUs, larger ones, or a shorter data.sequence_length"
    )


if __name__ == "__main__":
    run_command(main)
