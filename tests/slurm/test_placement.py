"""Where ranks lie: against megatron's own numbering, and over the switches of a cluster."""

import pytest

from slurm.placement import crossings, order_nodes, places


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (8, 1), (2, 4), (4, 2), (1, 4), (8, 8)])
@pytest.mark.parametrize("context", [1, 2])
def test_places_are_megatrons(tensor: int, pipeline: int, context: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    nodes = [f"n{number}" for number in range(1, 17)]
    table = places(nodes, 8, tensor, pipeline, context)
    data = len(table) // (tensor * pipeline * context)
    numbering = RankGenerator(tensor, 1, data, pipeline, context, "tp-cp-ep-dp-pp")
    fields = {"tp": "tensor", "pp": "pipeline", "dp": "data", "cp": "context"}
    for kind, field in fields.items():
        for group in numbering.get_ranks(kind):
            assert [getattr(table[rank], field) for rank in group] == list(range(len(group)))


def cluster(nodes: int, leaf: int) -> tuple[list[str], dict[str, str]]:
    """Nodes and their leaf switches."""
    names = [f"n{number}" for number in range(1, nodes + 1)]
    return names, {name: f"leaf{place // leaf}" for place, name in enumerate(names)}


def test_at_1024_nodes_tensor_stays_in_a_node_and_pipelines_under_a_switch() -> None:
    names, leaf_of = cluster(1024, 32)
    table = places(order_nodes(names, 8, leaf_of), 8, 8, 8)
    assert len(table) == 8192
    found = crossings(table, leaf_of)
    assert (found.tensor, found.over_switches) == (0, 0)
    assert found.pipelines == 7 * 8 * 128
    # In Slurm's own order every neighbour is under another switch.
    plain = crossings(places(names, 8, 8, 8), leaf_of)
    assert plain.over_switches == plain.pipelines


def test_tensor_groups_over_nodes_are_counted() -> None:
    names, leaf_of = cluster(4, 2)
    assert crossings(places(names, 2, 4, 1), leaf_of).tensor == 2


def test_nodes_that_lie_apart_are_gathered_by_switch() -> None:
    """Slurm gave nodes of two switches in turn; the stages of a pipeline shall not be over both."""
    names = ["n1", "n33", "n2", "n34"]
    leaf_of = {"n1": "a", "n2": "a", "n33": "b", "n34": "b"}
    order = order_nodes(names, 2, leaf_of)
    assert order == ["n1", "n33", "n2", "n34"]
    assert crossings(places(order, 8, 8, 2), leaf_of).over_switches == 0
    assert order_nodes(names, 1, leaf_of) == ["n1", "n2", "n33", "n34"]


def test_stages_that_do_not_divide_the_nodes_leave_the_order_alone() -> None:
    assert order_nodes(["n1", "n2", "n3"], 2) == ["n1", "n2", "n3"]
    assert order_nodes(["n1", "n2", "n3", "n4"], 2) == ["n1", "n3", "n2", "n4"]
