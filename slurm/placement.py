"""Which rank is on which node, and what it does there: its place in each kind of parallelism.

    python slurm/placement.py --config samba_3.8b --nodes 1024 --output placement.csv

Megatron numbers ranks tensor-parallel first, then context-parallel, data-parallel, pipeline: the
stages of one pipeline are a whole stage of ranks apart. Laid over nodes in their order, a pipeline
would cross the cluster. So the job script lays them out stage by stage over neighbouring nodes
(srun --distribution=arbitrary), the nodes sorted by their leaf switch.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from slurm import scheduler  # noqa: E402


class Place(NamedTuple):
    """One rank."""

    rank: int
    node: str
    local_rank: int
    tensor: int
    """Place in its tensor-parallel group."""
    pipeline: int
    """Pipeline stage."""
    data: int
    """Place in its data-parallel group."""
    context: int = 0
    """Place in its context-parallel group: the piece of the sequence."""


class Crossings(NamedTuple):
    """What has to go over the network."""

    tensor: int
    """Tensor-parallel groups that are on more than one node; must be 0."""
    pipelines: int
    """Pairs of neighbours in a pipeline."""
    over_switches: int
    """Those of them that are under different leaf switches."""


def order_nodes(
    nodes: Sequence[str], stages: int, leaf_of: dict[str, str] | None = None
) -> list[str]:
    """The nodes in the order in which ranks are laid on them.

    Args:
        nodes: of the job.
        stages: pipeline stages.
        leaf_of: each node's leaf switch; nodes that are not in it come last.

    Returns:
        Their own order, sorted by switch; where stages divide them, the stages of a pipeline on
        neighbours: of nodes a b c d and two stages, a and c hold the first and b and d the second.
    """
    leaves = leaf_of or {}
    first = {leaf: place for place, leaf in reversed(list(enumerate(map(leaves.get, nodes))))}
    by_switch = sorted(nodes, key=lambda node: first[leaves.get(node)])
    if len(nodes) % stages:
        return by_switch
    return [node for stage in range(stages) for node in by_switch[stage::stages]]


def places(
    order: Sequence[str], gpus: int, tensor: int, pipeline: int, context: int = 1
) -> list[Place]:
    """The table, by rank.

    Args:
        order: the nodes as :func:`order_nodes` gives them.
        gpus: of each node, and ranks on it.
        tensor: tensor-parallel size.
        pipeline: pipeline stages.
        context: context-parallel size.
    """
    together = tensor * context
    data = len(order) * gpus // (together * pipeline)
    return [
        Place(
            rank=rank,
            node=order[rank // gpus],
            local_rank=rank % gpus,
            tensor=rank % tensor,
            pipeline=rank // (together * data),
            data=rank // together % data,
            context=rank // tensor % context,
        )
        for rank in range(len(order) * gpus)
    ]


def crossings(table: Sequence[Place], leaf_of: dict[str, str]) -> Crossings:
    """Counts what a layout sends over the network.

    Args:
        table: of all ranks.
        leaf_of: each node's leaf switch; a node that is not in it is its own.
    """
    nodes_of_group: dict[tuple[int, int, int], set[str]] = {}
    node_at = {(p.pipeline, p.data, p.context, p.tensor): p.node for p in table}
    pairs = across = 0
    for place in table:
        own = place.data, place.context
        nodes_of_group.setdefault((place.pipeline, *own), set()).add(place.node)
        following = node_at.get((place.pipeline + 1, *own, place.tensor))
        if following is not None:
            pairs += 1
            here = leaf_of.get(place.node, place.node)
            across += leaf_of.get(following, following) != here
    return Crossings(sum(len(group) > 1 for group in nodes_of_group.values()), pairs, across)


def main() -> None:
    """Runs the command."""
    arguments = _parse()
    nodes, leaf_of = _nodes(arguments)
    tensor, pipeline, context = _layout(arguments.config)
    gpus = arguments.gpus_per_node
    together = tensor * pipeline * context
    if len(nodes) * gpus % together:
        raise UserError(
            f"{len(nodes)} × {gpus} GPUs are not a multiple of tensor {tensor} × context {context} "
            f"× pipeline {pipeline} = {together}: use another --nodes"
        )
    table = places(order_nodes(nodes, pipeline, leaf_of), gpus, tensor, pipeline, context)
    found = crossings(table, leaf_of)
    data = len(table) // together
    print(f"{len(table)} ranks on {len(nodes)} nodes: tensor {tensor}, context {context}, ", end="")
    print(f"pipeline {pipeline}, data {data}")
    print(f"tensor-parallel groups over more than one node: {found.tensor}")
    if found.pipelines and leaf_of:
        print(f"pipeline neighbours under different switches: {found.over_switches} ", end="")
        print(f"of {found.pipelines}")
    if arguments.output:
        _write(arguments.output, table)
        print(f"wrote {arguments.output}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, help="recipe, or config.yaml of a run")
    parser.add_argument("--nodes", type=int, help="number of nodes n1, n2, …")
    parser.add_argument("--nodelist", help="the nodes as Slurm writes them, with their switches")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--output", type=Path, help="file for the whole table, as CSV")
    arguments = parser.parse_args()
    if bool(arguments.nodes) == bool(arguments.nodelist):
        raise UserError("give --nodes 128 or --nodelist n[1-128], one of them")
    return arguments


def _nodes(arguments: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    if arguments.nodelist:
        return scheduler.hostnames(arguments.nodelist), scheduler.leaf_switches()
    return [f"n{number}" for number in range(1, arguments.nodes + 1)], {}


def _layout(config: str) -> tuple[int, int, int]:
    """Tensor, pipeline and context sizes."""
    from samba_megatron.config.load import parse_run_config

    parallel = parse_run_config(["--config", config], prog="placement.py").parallel
    return (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )


def _write(path: Path, table: Sequence[Place]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Place._fields)
        writer.writerows(table)


if __name__ == "__main__":
    run_command(main)
