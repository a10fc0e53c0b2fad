"""Trials that documents stay apart, in several layouts of one world.

Every rank draws the same packings (nothing is random between them) and learns of every rank's
finding, so that all go on, or shrink, alike. Prints a line for each layout that holds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import given, settings

from samba_megatron.config import ParallelConfig
from samba_megatron.platform import distributed
from tests.model.isolation import REFERENCE, TORCH, Packing, Trial, packings, toy_run

FULL: dict[str, Any] = {"recompute_granularity": "full"}
SELECTIVE: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": ["mamba", "attention", "mlp"],
}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2}
TP2_SP: dict[str, Any] = {**TP2, "sequence_parallel": True}
VPP2: dict[str, Any] = {
    "pipeline_model_parallel_size": 2,
    "virtual_pipeline_model_parallel_size": 2,
}
CP2: dict[str, Any] = {"context_parallel_size": 2}
CP4: dict[str, Any] = {"context_parallel_size": 4}
PP4: dict[str, Any] = {"pipeline_model_parallel_size": 4}
LAYOUTS: dict[str, tuple[int, dict[str, Any], ParallelConfig]] = {
    "tp2": (1, TORCH, ParallelConfig(**TP2)),
    "tp2 sp selective reference": (1, REFERENCE, ParallelConfig(**TP2_SP, **SELECTIVE)),
    "tp2 sp pp2 vpp2 full": (3, TORCH, ParallelConfig(**TP2_SP, **VPP2, **FULL)),
    "pp4 selective": (2, TORCH, ParallelConfig(**PP4, **SELECTIVE)),
    "cp4 selective": (3, TORCH, ParallelConfig(**CP4, **SELECTIVE)),
    "cp2 tp2 sp full": (2, TORCH, ParallelConfig(**CP2, **TP2_SP, **FULL)),
    "cp2 pp2 vpp2": (2, TORCH, ParallelConfig(**CP2, **VPP2)),
}
"""Packings to try, kernels and layout, each for four processes; those left over do the same."""


def try_layout(examples: int, kernels: dict[str, Any], parallel: ParallelConfig) -> None:
    """Packings in one layout."""
    with layout(parallel):
        trial = Trial(toy_run(kernels, parallel))

        @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
        @given(packings())
        def hold(packing: Packing) -> None:
            leaks = trial.leaks(packing)
            assert not leaks, leaks

        hold()


@contextmanager
def layout(parallel: ParallelConfig) -> Iterator[None]:
    """Process groups for a layout, inside."""
    distributed.initialize(parallel)
    try:
        yield
    finally:
        distributed.leave_layout()


def main() -> None:
    """The layouts of this world, and in some results recomputed, and the rotary embedding."""
    from tests.model import recomputing, rotating

    for name, settled in LAYOUTS.items():
        try_layout(*settled)
        _say(name)
    for name, parallel in recomputing.LAYOUTS.items():
        found = recomputing.differences(parallel, recomputing.TOGETHER)
        assert not found, found
        _say(f"recomputed: {name}")
    for name, parallel in rotating.LAYOUTS.items():
        off = rotating.differences(parallel)
        assert max(off.values()) <= 1e-6, off
        _say(f"rotary: {name}")
    distributed.shutdown()


def _say(held: str) -> None:
    if distributed.Rank.from_environment().rank == 0:
        print(f"=== {held}", flush=True)


if __name__ == "__main__":
    main()
