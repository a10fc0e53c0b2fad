"""The process's place among the others: device, process groups, small collectives.

One path for NCCL on GPUs and gloo on a CPU; started by torchrun, by srun (the launch script sets
the same variables), or alone.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from torch.distributed import ProcessGroup

    from samba_megatron.config import ParallelConfig

DeviceType = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Rank:
    """Where this process stands, as the launcher says it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> "Rank":
        """Reads torchrun's variables; a process without them is a world of one."""

        def read(name: str, default: int) -> int:
            value = os.environ.get(name, str(default))
            try:
                return int(value)
            except ValueError:
                raise UserError(
                    f"environment variable {name} is {value!r}, not a number: start with torchrun"
                ) from None

        world_size = read("WORLD_SIZE", 1)
        local_world_size = read("LOCAL_WORLD_SIZE", world_size)
        return Rank(read("RANK", 0), world_size, read("LOCAL_RANK", 0), local_world_size)


def device_type() -> DeviceType:
    """``"cuda"`` where this process has a GPU, else ``"cpu"``."""
    import torch

    from samba_megatron.platform import cpu_shim

    return "cuda" if torch.cuda.is_available() and not cpu_shim.is_installed() else "cpu"


def device() -> "torch.device":
    """The device that this process computes on."""
    import torch

    if device_type() == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def chosen_device(wanted: str, local_rank: int = 0) -> str:
    """What ``--device`` names: ``cpu``, ``cuda`` or ``cuda:1``.

    Args:
        wanted: the option; ``auto`` is a GPU where there is one, of several ranks each its own.
        local_rank: of this process on its node.

    Raises:
        UserError: it names no device, or one that is not here.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise UserError(f"--device {wanted} is no device: use auto, cpu, cuda or cuda:NUMBER")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = f"cuda:{local_rank % count}" if count else "cpu"
    if wanted == "cpu":
        return wanted
    if not count:
        raise UserError(f"--device {wanted}: this machine has no usable GPU; use cpu")
    number = wanted.partition(":")[2]
    if int(number or 0) >= count:
        raise UserError(f"--device {wanted}: this machine's GPUs end with cuda:{count - 1}")
    if number:
        torch.cuda.set_device(int(number))
    return wanted


def available_devices() -> tuple[DeviceType, int | None]:
    """(device type, GPUs of this machine); on a CPU any number of processes may share it."""
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.device_count()
    return "cpu", None


def keep_queued_order(parallel: "ParallelConfig") -> None:
    """Has tensor-parallel ranks work in the order in which kernels were queued, by which megatron
    overlaps collectives with matrix products. Must be called before anything asks CUDA."""
    if parallel.tensor_model_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def initialize(parallel: "ParallelConfig") -> Rank:
    """Joins the world (once) and builds megatron's process groups for a layout.

    May be called again after :func:`leave_layout`, with another layout.

    Raises:
        UserError: if the machine has fewer GPUs than local ranks.
    """
    import torch

    from samba_megatron.platform import cpu_shim, noise

    keep_queued_order(parallel)
    with noise.quiet_imports():
        on_cpu = cpu_shim.install()
        noise.import_megatron()
    rank = Rank.from_environment()
    if not on_cpu:
        if rank.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {rank.local_rank} has no GPU: this machine has "
                f"{torch.cuda.device_count()}; start at most that many processes "
                "(torchrun --nproc-per-node)",
                rank_specific=True,
            )
        torch.cuda.set_device(rank.local_rank)
    # torch remembers the last collectives of each rank, for the report on a hang.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if not torch.distributed.is_initialized():
        # Without a ``device_id``: with one, NCCL takes half a GiB of memory for each of megatron's
        # dozen groups at once; without it, for those that are used.
        # Without a launcher there is nobody to meet: no port is needed.
        alone = rank.world_size == 1 and "MASTER_ADDR" not in os.environ
        torch.distributed.init_process_group(
            backend="gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            world_size=rank.world_size,
            rank=rank.rank,
            store=torch.distributed.HashStore() if alone else None,
            timeout=timedelta(minutes=parallel.distributed_timeout_minutes),
        )
    _initialize_megatron_groups(parallel)
    if not on_cpu:
        _connect_senders()
    return rank


def _connect_senders() -> None:
    """Has NCCL connect the groups whose ranks send to each other (two stages of a pipeline do it in
    the world): its first exchange in a group waits for all of the group, and not every rank has a
    message to send or receive."""
    import torch
    from megatron.core import parallel_state

    for group in (
        torch.distributed.group.WORLD,
        parallel_state.get_context_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        if torch.distributed.get_world_size(group) > 1:
            torch.distributed.all_reduce(torch.zeros(1, device=device()), group=group)


def _initialize_megatron_groups(parallel: "ParallelConfig") -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=int(parallel.distributed_timeout_minutes),
        create_gloo_process_groups=device_type() == "cuda",
    )


def process_groups() -> "ProcessGroupCollection":
    """Megatron's process groups of this process."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    return ProcessGroupCollection.use_mpu_process_groups()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank; every rank must call it."""
    return bool(largest(int(flag)))


def largest(number: int) -> int:
    """The largest ``number`` of any rank; every rank must call it."""
    return largest_each(number)[0]


def largest_each(*numbers: int) -> list[int]:
    """The largest of each of these over the ranks; every rank must call it, with as many.

    It waits for all that the device was given before.
    """
    import torch

    values = torch.tensor(numbers, dtype=torch.int32, device=device())
    torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def gather_text(text: str) -> list[str]:
    """Every rank's ``text``, by rank, on every rank; every rank must call it."""
    import torch

    texts: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(texts, text)
    return [str(item) for item in texts]


def leave_layout() -> None:
    """Destroys megatron's process groups; the world stays.

    megatron forgets them only: over gloo each would keep its threads, sixty a layout, and every
    layout after it would be slower.
    """
    import torch
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return
    found = set(_groups_in(list(vars(parallel_state).values()))) - {torch.distributed.group.WORLD}
    # Over NCCL it takes all ranks to destroy one: in one order.
    groups = sorted(found, key=lambda each: each.group_name)
    parallel_state.destroy_model_parallel()
    for group in groups:
        # Beside NCCL, megatron has gloo groups, which it has destroyed itself.
        if group in torch.distributed.distributed_c10d._world.pg_map:
            torch.distributed.destroy_process_group(group)


def _groups_in(value: Any) -> Iterator["ProcessGroup"]:
    """The process groups in a value, or in a list or dictionary of them."""
    import torch

    if isinstance(value, torch.distributed.ProcessGroup):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _groups_in(each)


def shutdown() -> None:
    """Leaves the world; what follows may use no collective."""
    import torch

    if torch.distributed.is_initialized():
        leave_layout()
        torch.distributed.destroy_process_group()
