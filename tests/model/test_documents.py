"""Documents of a packed sample stay apart: bits, layouts, and each document as if alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from megatron.core.utils import get_model_config

from samba_megatron.config import ParallelConfig
from samba_megatron.model.samba import build_model
from samba_megatron.model.sequence import SequenceParams, documents_apart, sequence_params
from samba_megatron.platform import distributed
from tests.model.documents_ranks import FULL, LAYOUTS, SELECTIVE, layout, try_layout
from tests.model.isolation import (
    LENGTH,
    MICRO_BATCHES,
    REFERENCE,
    SEQUENCES,
    TORCH,
    VOCABULARY,
    Packing,
    Trace,
    Trial,
    packings,
    toy_run,
)
from tests.model.recomputing import LAYOUTS as RECOMPUTED
from tests.model.rotating import LAYOUTS as ROTATED
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(600)

PACKING = Packing(((20,), (), (70,), ()), sequence=0, position=19)
"""The last token before a document is changed."""


@pytest.fixture(scope="module", autouse=True)
def world():
    """Ends what the tests began."""
    yield
    distributed.shutdown()


@pytest.mark.parametrize(
    ("examples", "kernels", "parallel"),
    [
        (8, TORCH, ParallelConfig()),
        (4, TORCH, ParallelConfig(**FULL)),
        (4, TORCH, ParallelConfig(**SELECTIVE)),
        (2, REFERENCE, ParallelConfig()),
    ],
    ids=["torch", "full recomputation", "selective recomputation", "reference"],
)
def test_a_document_does_not_touch_another(examples, kernels, parallel):
    """Not a bit of outputs, losses and gradients, on one process."""
    try_layout(examples, kernels, parallel)


def test_a_document_touches_another_where_nobody_says_that_it_must_not():
    """The trial finds what leaks."""
    with layout(ParallelConfig()):
        (leaks,) = Trial(toy_run(TORCH, ParallelConfig())).leaks(PACKING, apart=False)
    for found in ("outputs", "gradients of the tokens", "gradient of 0.decoder.layers.0.mixer.D"):
        assert found in leaks


def test_a_document_does_not_touch_another_in_any_layout():
    """Tensor, sequence, pipeline and context parallelism, with recomputation; where results are
    recomputed, not a bit of the step changes; and where the projection is split and rotated in one,
    the step is megatron's."""
    said = run_ranks("tests.model.documents_ranks", 4, timeout=580)
    held = [line.removeprefix("=== ") for line in said.splitlines() if line.startswith("===")]
    others = [*(f"recomputed: {name}" for name in RECOMPUTED), *(f"rotary: {n}" for n in ROTATED)]
    assert held == [*LAYOUTS, *others]


def test_a_packed_document_is_the_document_alone():
    """Losses in fp64, for any packing: as if each document had the model to itself."""
    with layout(ParallelConfig()), torch.no_grad():
        chunk: Any = build_model(toy_run(TORCH, ParallelConfig()), "local")[0].double()
        # megatron computes the angles of the rotary embedding in fp32: positions would round apart.
        chunk.rotary_pos_emb.inv_freq = chunk.rotary_pos_emb.inv_freq.double()
        chunk.config.params_dtype = torch.float64
        generator = torch.Generator().manual_seed(5)
        shape = (SEQUENCES * MICRO_BATCHES, LENGTH)
        tokens, labels = (
            torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(2)
        )

        @settings(max_examples=8, derandomize=True, database=None)
        @given(packings())
        def hold(packing: Packing) -> None:
            start = packing.document_start()
            packed = chunk(
                tokens, None, None, labels=labels, packed_seq_params=documents_apart(start, "cpu")
            )
            for row in range(len(tokens)):
                firsts = start[row].nonzero().flatten().tolist()
                for first, last in zip(firsts, [*firsts[1:], LENGTH], strict=True):
                    own = (slice(row, row + 1), slice(first, last))
                    alone = chunk(tokens[own], None, None, labels=labels[own])
                    assert (packed[own] - alone).abs().max() < 1e-12

        hold()


def test_sequences_end_to_end_are_those_side_by_side():
    """But for the order in which products and gradients are summed."""

    def step(end_to_end: bool) -> Trace:
        trial = Trial(toy_run(TORCH, ParallelConfig()))
        (chunk,) = trial.chunks
        assert get_model_config(chunk).sequences_end_to_end
        get_model_config(chunk).sequences_end_to_end = end_to_end
        start = Packing(((20, 70), (), (1,), (LENGTH - 1,)), 0, 0).document_start()
        return trial.step(trial.tokens, torch.ones(trial.tokens.shape), start)

    with layout(ParallelConfig()):
        row, side = step(True), step(False)
    pairs = [*zip(row.outputs, side.outputs, strict=True)]
    pairs += [(gradient, side.gradients[number]) for number, gradient in row.gradients.items()]
    for one, other in pairs:
        assert one.shape[:2] == (SEQUENCES * LENGTH, 1) and other.shape[:2] == (LENGTH, SEQUENCES)
        rows = one.unflatten(0, (SEQUENCES, LENGTH)).squeeze(2)
        assert (rows - other.transpose(0, 1)).abs().max() <= 1e-5 * other.abs().max()
    for name, gradient in row.parameters.items():
        other = side.parameters[name]
        assert (gradient - other).abs().max() <= 1e-5 * other.abs().max(), name


def test_what_is_not_a_sequence_of_ours_is_refused():
    from megatron.core.packed_seq_params import PackedSeqParams

    with pytest.raises(NotImplementedError, match="Megatron's packed format"):
        sequence_params(PackedSeqParams(qkv_format="thd"))
    with pytest.raises(ValueError, match="not in the format thd"):
        SequenceParams(qkv_format="thd")
    assert sequence_params(None).reset is None
