"""What can be known before a job waits in the queue for nothing: time, layout, paths, disk, memory.

Each check is a function that raises a UserError of one sentence, or returns what is worth telling.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from samba_megatron.config import RunConfig
from samba_megatron.config.checks import check_config
from samba_megatron.data.blend import training_blend, validation_blend
from samba_megatron.data.indexed import shards_remedy
from samba_megatron.data.made_with import other_tokenizers
from samba_megatron.platform.errors import UserError
from slurm import scheduler
from slurm.site_settings import Site

_LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/proc")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_SHARED_FILE_SYSTEMS = re.compile(
    r"nfs|lustre|gpfs|beegfs|ceph|wekafs|panfs|daos|afs|cifs|smb|9p|virtiofs|fuse|glusterfs"
)


def seconds_of(time: str) -> int:
    """Seconds of a duration as it is given on the command line.

    Raises:
        UserError: it is not written as Slurm writes one.
    """
    seconds = scheduler.seconds(time)
    if seconds is None:
        raise UserError(
            f"--time {time!r} is not a time as Slurm writes it: use HH:MM:SS (24:00:00), "
            "D-HH:MM:SS (2-00:00:00) or minutes (90)"
        )
    return seconds


def time_limit(time: str, signal_minutes: float) -> None:
    """The job is longer than the time between Slurm's signal and the limit."""
    seconds = seconds_of(time)
    if seconds <= 60 * signal_minutes:
        raise UserError(
            f"--time {time} is not longer than the {signal_minutes:g} minutes before its end at "
            "which the run is asked to save: give more time, or a smaller --signal-minutes"
        )


def layout(config: RunConfig, nodes: int, gpus: int) -> None:
    """All rules of the configuration hold on nodes × GPUs; tensor parallelism stays in a node."""
    tensor = config.parallel.tensor_model_parallel_size
    if gpus % tensor and nodes > 1:
        raise UserError(
            f"parallel.tensor_model_parallel_size {tensor} does not divide the {gpus} GPUs of a "
            "node: tensor parallelism would cross nodes; use one that does"
        )
    check_config(config, nodes * gpus, "cuda", gpus, gpus)


def paths(config: RunConfig, run_dir: Path, site: Site) -> None:
    """What the run reads is there, and everything lies where all nodes see it."""
    inputs = list(_inputs(config))
    for name, path in inputs:
        if not path.exists():
            remedy = shards_remedy(path.with_suffix("")) if path.suffix == ".bin" else None
            raise UserError(
                f"{name} names {path}, which is not there: {remedy or 'check the path'}"
            )
    everything = [
        *inputs,
        ("--run-dir", run_dir),
        ("checkpoint.save", Path(str(config.checkpoint.save))),
    ]
    for name, path in everything:
        _refuse_local(name, path.absolute(), site.shared_paths)


def tokenizer_remarks(config: RunConfig) -> list[str]:
    """Where none is named, or datasets were made with another."""
    if not config.data.tokenizer:
        return [
            "data.tokenizer is not named: exports of this run will be without one, unless "
            "convert_checkpoint.py is given --tokenizer"
        ]
    return other_tokenizers(config.data)


def container(site: Site, image: str | None) -> None:
    """An image is given where the ranks run in a container, and only there."""
    kind = site.runtime.kind
    if kind == "virtualenv" and image:
        raise UserError(
            f"--container {image} needs a site whose runtime.kind is pyxis or apptainer, and it "
            "is virtualenv: set it in the site's file"
        )
    if kind != "virtualenv" and not (image or site.runtime.image):
        raise UserError(f"the site's runtime is {kind}: name an image with --container")


def _inputs(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """What the run reads: (who names it, path)."""
    data = config.data
    yield from (("data.blend_file", Path(file)) for file in data.blend_file)
    blends = [training_blend(data)]
    if data.valid_data_path:
        blends.append(validation_blend(data.valid_data_path))
    for blend in blends:
        for prefix in blend.prefixes:
            yield blend.place, Path(f"{prefix}.bin")
            yield blend.place, Path(f"{prefix}.idx")
    if data.tokenizer:
        yield "data.tokenizer", Path(data.tokenizer)
    if config.checkpoint.load:
        yield "checkpoint.load", Path(config.checkpoint.load)


def _refuse_local(name: str, path: Path, shared: list[str]) -> None:
    if shared:
        if not any(path.is_relative_to(folder) for folder in shared):
            raise UserError(
                f"{name} {path} is not under {' or '.join(shared)}, which the site's "
                "shared_paths name as seen by all nodes: put it there"
            )
    elif any(path.is_relative_to(folder) for folder in _LOCAL_FOLDERS):
        raise UserError(
            f"{name} {path} is on this machine only: use a folder that all nodes share, or "
            "name it in the site's shared_paths if they do"
        )
    elif file_system(path) in _MEMORY_FILE_SYSTEMS:
        raise UserError(f"{name} {path} is in this machine's memory: use a folder that nodes share")


def file_system(path: Path) -> str:
    """The type of the file system that a path is on, or will be; "" if that is not known."""
    best, kind = "", ""
    path = path.resolve()
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in mounts:
        _, point, type_of, *_ = line.split()
        if len(point) > len(best) and path.is_relative_to(point):
            best, kind = point, type_of
    return kind


def maybe_local(path: Path, site: Site) -> str | None:
    """A remark where a folder's file system is not one of those that clusters share."""
    kind = file_system(path.absolute())
    if site.shared_paths or not kind or _SHARED_FILE_SYSTEMS.search(kind):
        return None
    return f"{path} is on {kind}: make sure that all nodes see it (the site's shared_paths)"


def memory(config: RunConfig, world_size: int, gpu_gib: float | None) -> str:
    """The fullest GPU holds what it must.

    Args:
        config: the run.
        world_size: its ranks.
        gpu_gib: memory of a GPU; None where the site does not say.

    Returns:
        What is needed.
    """
    from samba_megatron.planning.memory import estimate

    needed = estimate(config, world_size).total_bytes / 2**30
    if gpu_gib is not None and needed > gpu_gib:
        raise UserError(
            f"the fullest GPU needs {needed:.1f} GiB and the site's have {gpu_gib:g}: lower "
            "training.micro_batch_size, set parallel.recompute_granularity, or use more tensor or "
            "pipeline parallelism"
        )
    return f"the fullest GPU needs {needed:.1f} GiB"


def disk(config: RunConfig) -> str:
    """There is room for the checkpoints that are kept at once, and for one being written.

    Returns:
        What is needed and what is free.
    """
    from samba_megatron.planning.memory import checkpoint_bytes

    one = checkpoint_bytes(config)
    keep = config.checkpoint.keep_last
    wanted = one * ((keep or 1) + 1)
    folder = Path(str(config.checkpoint.save)).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    present = sum(file.stat().st_size for file in folder.glob("step_*/**/*") if file.is_file())
    free = shutil.disk_usage(there).free
    kept = f"{keep} are kept" if keep else "all are kept"
    said = f"a checkpoint takes {one / 1e9:.3g} GB and {kept}; {free / 1e9:.3g} GB are free"
    if free + present < wanted:
        raise UserError(
            f"{folder}: {said}, {wanted / 1e9:.3g} GB are needed: make room, lower "
            "checkpoint.keep_last, or choose another checkpoint.save"
        )
    return said


def cluster(partition: str | None, gpus: int) -> None:
    """The partition exists, and its nodes have that many GPUs.

    Raises:
        UserError: otherwise.
    """
    names = scheduler.partitions()
    if partition and partition not in names:
        raise UserError(
            f"there is no partition {partition} on this cluster: use --partition "
            f"{' or '.join(names)}"
        )
    most = max(map(_gpus_in, scheduler.resources_of_nodes(partition)), default=None)
    if most is not None and most < gpus:
        raise UserError(
            f"--gpus-per-node {gpus} is more than any node of the partition has ({most}): use "
            f"{most or 'another partition'}"
        )


def _gpus_in(kind: str) -> int:
    """``gpu:a100:8(S:0-1)`` has 8."""
    found = re.findall(r"gpu:(?:[^:,()]+:)?(\d+)", kind)
    return sum(map(int, found))
