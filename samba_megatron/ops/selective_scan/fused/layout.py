"""What the kernels are called with: their argument structures, their sizes, the division of work.

The structures repeat those of the .cuh files, field by field. Nothing here needs torch or a GPU.
"""

import ctypes
import math
from dataclasses import asdict, dataclass

THREADS = 128
"""Threads of every block, and channels that one works on."""
GROUP = 16
"""States that the backward works on at a time."""
TILE = 4
"""Steps whose decays and states the backward has in registers at once."""
LARGEST_CHUNK, SMALLEST_CHUNK = 32, 16
"""Steps between two saved states: the former, unless a GPU has too little shared memory for it."""
REGISTER_USAGE_LEVEL = 5
"""How freely the assembler spends registers, from 0 to 10: it changes what waits for what. Both 0
and 10 were measured to be slower."""
LEAST_SEGMENT_CHUNKS = 4
"""A sequence is not cut into shorter segments than this."""


class Strided(ctypes.Structure):
    """A tensor [time, batch, x] with contiguous x; strides in bytes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("time_stride", ctypes.c_int),
        ("batch_stride", ctypes.c_int),
    )


class Plan(ctypes.Structure):
    """How a call's work is divided; see common.cuh."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in (
            "length",
            "batch",
            "channels",
            "channel_blocks",
            "chunks",
            "segments",
            "segment_chunks",
            "worker_chunks",
        )
    )


def _structure(name: str, layout: str) -> type[ctypes.Structure]:
    """A structure from "field:kind" words: plan, strided, int, and pointers by default."""
    kinds = {"plan": Plan, "strided": Strided, "int": ctypes.c_int, "": ctypes.c_void_p}
    fields = [word.partition(":") for word in layout.split()]
    return type(
        name,
        (ctypes.Structure,),
        {"_fields_": tuple((field, kinds[kind]) for field, _, kind in fields)},
    )


ForwardArguments = _structure(
    "ForwardArguments",
    "plan:plan u:strided delta:strided z:strided B:strided C:strided A D delta_bias reset start "
    "y:strided checkpoints end total_step carry flags",
)
CombineArguments = _structure(
    "CombineArguments",
    "segments:int batch:int channels:int backward_in_time:int A outer local total_step start",
)
BackwardArguments = _structure(
    "BackwardArguments",
    "plan:plan u:strided delta:strided z:strided B:strided C:strided dy:strided A D delta_bias "
    "reset checkpoints dend du:strided ddelta:strided dz:strided dprojections dA dD dbias dstart "
    "carry flags",
)
ReduceArguments = _structure("ReduceArguments", "tokens:int channel_blocks:int dprojections dB dC")


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for."""

    element: int
    """Dtype of the activations: 0 for fp32, 1 for fp16, 2 for bf16."""
    states: int
    """d_state: 8, 16, 32 or 64."""
    gated: bool = True
    softplus: bool = True
    chunk: int = LARGEST_CHUNK
    """Steps between two saved states."""

    def definitions(self) -> tuple[str, ...]:
        """Preprocessor definitions, as "NAME=value"."""
        return tuple(f"SCAN_{name.upper()}={int(value)}" for name, value in asdict(self).items())

    def options(self) -> tuple[str, ...]:
        """The compiler's options, but for the architecture."""
        definitions = [f"-D{definition}" for definition in self.definitions()]
        level = f"--ptxas-options=--register-usage-level={REGISTER_USAGE_LEVEL}"
        return ("--std=c++17", level, *definitions)

    @property
    def groups(self) -> int:
        """Groups of states in the backward."""
        return max(1, self.states // GROUP)

    @property
    def forward_carry(self) -> int:
        """Floats that a thread hands over in the forward kernels."""
        return self.states + 1

    @property
    def backward_carry(self) -> int:
        """Floats that a thread hands over in the backward."""
        return self.groups * 2 * GROUP + 2

    def shared_bytes(self, kernel: str) -> int:
        """Dynamic shared memory of a block of the named kernel."""
        if kernel == "scan_backward":
            states = (self.chunk // TILE - 1) * 64 * THREADS
            activations = self.chunk * 12 * THREADS
            projections = self.chunk * (256 + 4)
            sums = self.chunk * 16 * THREADS if self.groups > 1 else 0
            return states + activations + projections + sums
        if kernel.startswith("scan_"):
            return 2 * self.chunk * (2 * self.states + 1) * 4
        return 0


def divide(
    length: int, batch: int, channels: int, chunk: int, workers: int, split_below: float
) -> tuple[Plan, int]:
    """Divides a call's work over at most `workers` blocks that the card holds at once.

    Time is cut into segments, at the cost of running through it once more, where there are fewer
    than `split_below` · `workers` blocks of channels to work on.

    Returns:
        The plan and the number of blocks to launch.
    """
    channel_blocks, chunks = math.ceil(channels / THREADS), math.ceil(length / chunk)
    rows = batch * channel_blocks
    segments = 1
    if rows < split_below * workers:
        segments = max(1, min(math.ceil(workers / rows), chunks // LEAST_SEGMENT_CHUNKS))
    segment_chunks = math.ceil(chunks / segments)
    segments = math.ceil(chunks / segment_chunks)
    jobs = rows * segments
    blocks = min(workers, jobs)
    worker_chunks = math.ceil(jobs * segment_chunks / blocks)
    plan = Plan(
        length=length,
        batch=batch,
        channels=channels,
        channel_blocks=channel_blocks,
        chunks=chunks,
        segments=segments,
        segment_chunks=segment_chunks,
        worker_chunks=worker_chunks,
    )
    return plan, blocks
