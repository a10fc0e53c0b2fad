"""The kernels' source: one text from the .cuh files beside this one."""

from functools import cache
from pathlib import Path

PARTS = (
    "primitives.cuh",
    "common.cuh",
    "forward.cuh",
    "lanes.cuh",
    "staging.cuh",
    "tile.cuh",
    "backward.cuh",
)
"""The files, in the order in which they build on one another."""


@cache
def kernel_source() -> str:
    """All parts, each introduced by its name so that a compiler's message points to it."""
    folder = Path(__file__).parent
    return "".join(f'#line 1 "{part}"\n{(folder / part).read_text("utf-8")}' for part in PARTS)
