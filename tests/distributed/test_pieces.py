"""Training on sequences piece by piece: exact gradients are the whole sequence's."""

from typing import Any

import pytest

from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from tests.distributed.toy import launch, losses, toy_config, write_dataset

STEPS = 6
PIECES, TRUNCATED = "parallel.sequence_pieces", {"parallel.sequence_piece_gradients": "truncated"}
PARTS = {
    "parallel.recompute_granularity": "selective",
    "parallel.recompute_modules": list(RECOMPUTABLE_PARTS),
}
RUNS: dict[str, dict[str, Any]] = {
    "whole": {},
    "two": {PIECES: 2},
    "eight": {PIECES: 8},
    "two, chunked logits": {PIECES: 2, "kernels.cross_entropy": "chunked"},
    "eight, short convolutions": {PIECES: 8, "model.short_convolution": True},
    "whole, short convolutions": {"model.short_convolution": True},
    "eight, full attention": {PIECES: 8, "model.hybrid_layer_pattern": "M-F- x2"},
    "whole, full attention": {"model.hybrid_layer_pattern": "M-F- x2"},
    "two, results recomputed": {PIECES: 2, **PARTS},
    "truncated": {PIECES: 4, **TRUNCATED},
    "truncated, recomputed": {
        PIECES: 4,
        **TRUNCATED,
        "parallel.recompute_granularity": "full",
    },
    "truncated, results recomputed": {PIECES: 4, **TRUNCATED, **PARTS},
}
"""What differs from a run on whole sequences of 64 tokens."""
ON_TWO = {
    "two, tp2 sp": {
        PIECES: 2,
        "parallel.tensor_model_parallel_size": 2,
        "parallel.sequence_parallel": True,
    },
    "two, dp2": {PIECES: 2},
}
"""The same on two ranks."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], list[float]]]:
    """Training and validation losses."""
    folder = tmp_path_factory.mktemp("pieces")
    prefix = write_dataset(folder)
    specs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for name, fields in {**RUNS, **ON_TWO}.items():
        config = toy_config(prefix, folder / name, **{"training.train_steps": STEPS, **fields})
        config |= {
            "data.reset_at_document_boundaries": True,
            "data.valid_data_path": [prefix],
            # Shorter than a piece of two, as long as a sequence, longer.
            "validation.sequence_lengths": [16, 64, 128],
            "validation.eval_at_end": True,
            "validation.eval_tokens": 512,
        }
        specs[2 if name in ON_TWO else 1].append({"name": name, "config": config})
    for ranks, runs in specs.items():
        launch(ranks, runs, folder)
    return {
        name: (losses(folder / name), losses(folder / name, "validation"))
        for name in (*RUNS, *ON_TWO)
    }


def worst(one: tuple[list[float], list[float]], other: tuple[list[float], list[float]]) -> float:
    pairs = [*zip(one[0], other[0], strict=True), *zip(one[1], other[1], strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize(
    ("pieces", "whole"),
    [
        ("two", "whole"),
        ("eight", "whole"),
        ("two, chunked logits", "whole"),
        ("two, tp2 sp", "whole"),
        ("two, dp2", "whole"),
        ("eight, short convolutions", "whole, short convolutions"),
        ("eight, full attention", "whole, full attention"),
    ],
)
def test_exact_pieces_train_as_the_whole(runs: Any, pieces: str, whole: str) -> None:
    assert len(runs[pieces][0]) == STEPS
    assert worst(runs[pieces], runs[whole]) < 1e-5


def test_truncated_gradients_begin_equal_and_differ_then(runs: Any) -> None:
    """The forward pass is exact: only what is learnt can differ."""
    apart = [abs(a - b) for a, b in zip(runs["truncated"][0], runs["whole"][0], strict=True)]
    assert apart[0] < 1e-6 < 1e-5 < apart[-1]
    assert runs["truncated"] == runs["truncated, recomputed"]


def test_recomputed_results_change_no_bit(runs: Any) -> None:
    for name in ("two", "truncated"):
        assert runs[name] == runs[f"{name}, results recomputed"]
