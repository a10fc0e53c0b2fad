import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samba_megatron.config.pattern import (
    describe_layers,
    expand_pattern,
    layer_symbols,
    split_stages,
    to_megatron,
)
from samba_megatron.platform.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("M-*-", "M-*-"),
        ("M-*- x2", "M-*-M-*-"),
        ("M- x2 F- M- x1", "M-M-F-M-"),
        ("M-*- | M-*-", "M-*-|M-*-"),
        ("M-*-|M-*-", "M-*-|M-*-"),
        ("M- |*- x2", "M-|*-|*-"),
        ("  M   x3 ", "MMM"),
    ],
)
def test_repeats_are_written_out(pattern, expanded):
    assert expand_pattern(pattern) == expanded


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("M-E-", "unknown symbol 'E'"),
        ("M-*-x6", "after a space, xN"),
        ("M-*- X6", "unknown symbol 'X'"),
        ("x3 M-", "x3 must follow a group"),
        ("M- x2 x3", "x3 must follow a group"),
        ("M- x0", "at least once"),
        ("", "is empty"),
        ("M-|", "stage without layers"),
        ("|M-", "stage without layers"),
        ("M-||*-", "stage without layers"),
        ("M-| x2", "stage without layers"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(pattern, says):
    with pytest.raises(UserError) as refused:
        expand_pattern(pattern)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_symbol_lists_the_alphabet():
    with pytest.raises(UserError, match=r"M \(Mamba\), \* \(.*F \(.*- \(MLP\), \| \("):
        expand_pattern("MG*-")


@pytest.mark.parametrize(
    ("pattern", "pipeline", "virtual", "stages"),
    [
        ("M-*- x2", 1, None, ["M-*-M-*-"]),
        ("M-*- x2", 2, None, ["M-*-", "M-*-"]),
        ("M-*- x2", 2, 2, ["M-", "*-", "M-", "*-"]),
        # The remainder goes to the middle: the ends have the embedding and the head.
        ("M- x5", 3, None, ["M-M-", "M-M-", "M-"]),
        ("M- x7", 3, None, ["M-M-", "M-M-M-", "M-M-"]),
        ("M- x6", 4, None, ["M-", "M-M-", "M-M-", "M-"]),
        ("M*- x4", 2, None, ["M*-M*-", "M*-M*-"]),
        ("M x6", 4, None, ["M", "MM", "MM", "M"]),
        ("M-M-M-MMMMMM-", 2, None, ["M-M-M-", "MMMMMM-"]),
        ("M-M", 2, None, ["M-", "M"]),
        ("M|-*-", 2, None, ["M", "-*-"]),
    ],
)
def test_cuts_are_kept_or_placed_evenly_on_block_boundaries(pattern, pipeline, virtual, stages):
    assert split_stages(pattern, pipeline, virtual) == stages


@given(
    blocks=st.lists(st.sampled_from(["M-", "*-", "M*-", "MMF-"]), min_size=1, max_size=9),
    chunks=st.integers(1, 5),
)
@settings(max_examples=150)
def test_placed_cuts_are_the_most_even_ones(blocks, chunks):
    pattern = "".join(blocks)
    if len(blocks) < chunks:
        with pytest.raises(UserError, match="use at most"):
            split_stages(pattern, chunks)
        return

    def unevenness(cuts):
        edges = [0, *cuts, len(blocks)]
        lengths = [len("".join(blocks[a:b])) for a, b in itertools.pairwise(edges)]
        return sum(length**2 for length in lengths), lengths[-1], lengths[0]

    stages = split_stages(pattern, chunks)
    assert "".join(stages) == pattern
    assert len(stages) == chunks
    assert all(stage.endswith("-") for stage in stages)
    lengths = [len(stage) for stage in stages]
    if chunks > 1:
        least = min(map(unevenness, itertools.combinations(range(1, len(blocks)), chunks - 1)))
        assert (sum(length**2 for length in lengths), lengths[-1], lengths[0]) == least


def test_cuts_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(UserError, match=r"needs 2 model chunks.*make 3"):
        split_stages("M-|*-|M-", 2)
    with pytest.raises(UserError, match=r"needs 1 model chunks.*make 2"):
        split_stages("M-|*-", 1)
    with pytest.raises(UserError, match=r"pipeline_model_parallel_size 4 needs 8.*4 blocks"):
        split_stages("M-*- x2", 2, 4)


def test_megatron_sees_one_attention_and_is_told_where_it_has_no_window():
    assert to_megatron("M-F- *- F-", 2) == ("M-*-|*-*-", (3, 7))
    assert to_megatron("M-*- x2", 2, 2) == ("M-|*-|M-|*-", ())


def test_megatron_core_accepts_what_it_is_given():
    from megatron.core.models.hybrid.hybrid_layer_allocation import (
        get_hybrid_layer_counts,
        get_hybrid_total_pipeline_segment_count,
        parse_hybrid_pattern,
    )

    pattern, full = to_megatron("M- F- M-*- x5", 3, 2)
    assert parse_hybrid_pattern(pattern).main_pattern == pattern
    assert get_hybrid_total_pipeline_segment_count(pattern) == 6
    counts = get_hybrid_layer_counts(pattern)
    assert (counts["M"], counts["*"], counts["-"]) == (6, 6, 12)
    assert full == (3,)


def test_the_layer_map_names_stage_numbers_and_kinds():
    assert describe_layers("M-*- F-", 1) == [
        "stage 0: layers 1-6 M-*-F- (1 Mamba, 1 windowed attention, 1 full attention, 3 MLP)"
    ]
    assert describe_layers("M-*- x2", 2, 2) == [
        "stage 0 chunk 0: layers 1-2 M- (1 Mamba, 1 MLP)",
        "stage 1 chunk 0: layers 3-4 *- (1 windowed attention, 1 MLP)",
        "stage 0 chunk 1: layers 5-6 M- (1 Mamba, 1 MLP)",
        "stage 1 chunk 1: layers 7-8 *- (1 windowed attention, 1 MLP)",
    ]


def test_layer_symbols_have_no_cuts():
    assert layer_symbols("M- | *- x2") == "M-*-*-"


def test_patterns_are_read_without_torch():
    code = (
        "import sys; from samba_megatron.config.pattern import split_stages; split_stages('M-', 1);"
        "assert not {'torch', 'megatron', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
