"""The kernels' source: one text from the .cuh files beside this one."""

from functools import cache
from pathlib import Path

from samba_megatron.ops.selective_scan.fused.layout import Backward

_SHARED = ("primitives.cuh", "common.cuh", "forward.cuh", "lanes.cuh")
_BACKWARDS = {
    Backward.CHANNELS: ("staging.cuh", "backward.cuh"),
    Backward.PAIRS: ("pairs_staging.cuh", "pairs_tile.cuh", "pairs_backward.cuh"),
}


def parts(backward: Backward = Backward.CHANNELS) -> tuple[str, ...]:
    """The files, in the order in which they build on one another."""
    return _SHARED + _BACKWARDS[backward]


@cache
def kernel_source(backward: Backward = Backward.CHANNELS) -> str:
    """All parts, each introduced by its name so that a compiler's message points to it."""
    folder = Path(__file__).parent
    return "".join(
        f'#line 1 "{part}"\n{(folder / part).read_text("utf-8")}' for part in parts(backward)
    )
