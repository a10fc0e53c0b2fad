"""What the planner proposes to recompute: legal, as its printed options say, and never in vain."""

import shlex
from collections import defaultdict
from functools import cache
from itertools import pairwise

import pytest

from samba_megatron.config.load import parse_run_config
from samba_megatron.planning import plan, report
from samba_megatron.planning.layout import Layout
from samba_megatron.planning.memory import stage_memory
from samba_megatron.platform.hardware import gpu_named

H100 = gpu_named("h100")
SMALL = ("--training.global_batch_size", "64")
PARTS = ["mlp_act", "conv1d", "dt_proj", "layernorm"]
LONG = [
    *("--data.sequence_length", "98304", "--training.global_batch_size", "8"),
    *("--model.vocab_size", "128256"),
]
"""A sequence whose logits and their gradient alone are 47 GiB."""
Shape = tuple[int, int, int, int, int]


@cache
def search(recipe: str, number: int, *fields: str) -> list[plan.Plan]:
    return plan.search(parse_run_config(["--config", recipe, *fields]), number, H100)


def shape(each: plan.Plan) -> Shape:
    """All that a plan chooses beside recomputation."""
    layout = each.layout
    size = layout.config.training.micro_batch_size
    return layout.tensor, layout.context, layout.pipeline, layout.virtual, size


def by_shape(plans: list[plan.Plan]) -> dict[Shape, list[plan.Plan]]:
    found: dict[Shape, list[plan.Plan]] = defaultdict(list)
    for each in plans:
        found[shape(each)].append(each)
    return found


def recomputing(each: plan.Plan, *names: str) -> plan.Plan:
    """The same layout with another choice of recomputation; none without names."""
    fields = {
        "recompute_granularity": "selective" if names else None,
        "recompute_modules": list(names) or ["mamba"],
    }
    config = plan.with_fields(each.layout.config, fields)
    return plan.judge(config, each.layout.world_size, each.gpu)


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["samba_1.3b"], 2),
        (["samba_1.3b", "--parallel.recompute_granularity", "full"], 2),
        (["samba_1.3b", "--parallel.recompute_granularity", "selective"], 2),
        (["samba_1.3b", "--precision.fp8", "hybrid"], 2),
        (["samba_1.3b", *LONG], 1),
    ],
)
def test_the_printed_options_are_the_plan(words: list[str], number: int) -> None:
    """Parsed from the line that submits it: memory and time to the last bit, for each choice."""
    words = ["--config", *words]
    recipe = parse_run_config(words)
    found = plan.search(recipe, number, H100)
    names = {report.recomputation(each) for each in found}
    assert {"none", "parts", "mamba", "full"} <= names
    for name in names:
        proposed = [each for each in found if report.recomputation(each) == name]
        for each in (proposed[0], proposed[len(proposed) // 2], proposed[-1]):
            line = shlex.split(report.submit_command(each, recipe, words, 10**9))
            options = line[line.index("RUN_DIR") + 1 :]
            again = plan.judge(parse_run_config([*words, *options]), number, H100)
            assert again.memory == each.memory and again.time == each.time
            assert report.recomputation(again) == name
            assert not plan.problems(again.layout.config, number)


@pytest.mark.parametrize(
    ("recipe", "fields", "parts", "scan_too"),
    [
        ("samba_1.3b", [], PARTS, True),
        ("samba_1.3b", ["--precision.fp8", "hybrid"], ["conv1d", "dt_proj"], False),
        ("samba_1.3b", ["--precision.fp32_residual_connection", "true"], PARTS[:3], True),
        ("mamba_1.3b", [], PARTS[1:], True),
        ("llama2_1.3b", [], ["mlp_act", "layernorm"], False),
    ],
)
def test_parts_are_those_that_save(
    recipe: str, fields: list[str], parts: list[str], scan_too: bool
) -> None:
    """Of the four, what the model has and its precision would keep."""
    named: dict[str, list[str]] = {}
    for each in search(recipe, 2, *fields):
        parallel = each.layout.config.parallel
        named[report.recomputation(each)] = list(parallel.recompute_modules)
    assert named["parts"] == parts
    assert named.get("parts+scan") == ([*parts, "scan"] if scan_too else None)


@pytest.mark.parametrize(
    "fields", [[], ["--precision.fp8", "hybrid"], ["--kernels.cross_entropy", "chunked"]]
)
def test_more_recomputation_is_slower_and_smaller(fields: list[str]) -> None:
    """On every pipeline stage of every layout."""
    chains: list[tuple[str, ...]] = [("mamba", "mlp")]
    chains.append(("conv1d", "dt_proj") if "--precision.fp8" in fields else (*PARTS, "scan"))
    for same in by_shape(search("samba_1.3b", 4, *SMALL, *fields)).values():
        for chain in chains:
            plans = [recomputing(same[0], *chain[:count]) for count in range(len(chain) + 1)]
            for less, more in pairwise(plans):
                assert more.time.total >= less.time.total
                assert more.memory.total_bytes <= less.memory.total_bytes
                for stage in range(less.layout.pipeline):
                    kept, before = (stage_memory(p.layout, stage) for p in (more, less))
                    assert kept.activations <= before.activations
                    assert kept.total_bytes <= before.total_bytes


def test_only_what_is_beaten_in_both_is_left_out() -> None:
    """Each layout's choices save memory for time; whatever else could be chosen is no better in
    both than one of them."""
    choices = [(), PARTS, [*PARTS, "scan"], ["mamba"], ["mamba", "mlp"]]
    for same in by_shape(search("samba_1.3b", 4, *SMALL)).values():
        figures = sorted((each.time.total, each.memory.total_bytes) for each in same)
        sizes = [size for _, size in figures]
        assert sizes == sorted(set(sizes), reverse=True)
        for names in choices:
            other = recomputing(same[0], *names)
            assert any(
                seconds <= other.time.total and size <= other.memory.total_bytes
                for seconds, size in figures
            )


def test_parts_make_room_for_a_faster_layout() -> None:
    """1.7B on 80 GB: the largest micro-batch that is worth it does not fit without them."""
    best = search("samba_1.7b", 4, *SMALL)[0]
    assert best.fits and report.recomputation(best) == "parts"
    assert not recomputing(best).fits


def test_the_chunked_head_is_for_what_does_not_fit_otherwise() -> None:
    """And only where the configuration leaves the choice."""
    found = search("samba_1.3b", 1, *LONG)
    heads = {each.layout.config.kernels.cross_entropy for each in found if each.fits}
    assert heads == {"chunked"}
    assert "--kernels.cross_entropy" in report.overrides(
        found[0], parse_run_config(["--config", "samba_1.3b", *LONG])
    )
    assert not any(
        each.fits for each in search("samba_1.3b", 1, *LONG, "--kernels.cross_entropy", "megatron")
    )
    usual = search("samba_1.3b", 4, *SMALL)
    assert not all(each.fits for each in usual)
    assert {each.layout.config.kernels.cross_entropy for each in usual} == {"auto"}


def test_exact_gradients_of_pieces_go_with_parts_alone() -> None:
    """A million tokens, planned for one GPU of 80 GB; whole layers computed again are refused."""
    pieces = ["--data.sequence_length", "1048576", "--parallel.sequence_pieces", "32"]
    pieces += ["--training.micro_batch_size", "1", "--training.global_batch_size", "1"]
    found = search("samba_1.3b", 1, *pieces)
    assert [report.recomputation(each) for each in found if each.fits] == ["parts", "parts+scan"]
    assert all(Layout(each.layout.config, 1).pieces == 32 for each in found)
