"""What the machine itself grants: GPUs, driver, compilers, Slurm, room, shared memory, limits."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from samba_megatron.platform import nvidia_smi
from samba_megatron.platform.findings import Finding, Probe, State
from samba_megatron.platform.hardware import node_name

AREA = "machine"
_GIB = 2**30
_LEAST_DISK_GIB = 50
_LEAST_SHARED_GIB = 1
_LEAST_FILES = 4096
_LEAST_PROCESSES = 4096
_INFINIBAND = Path("/sys/class/infiniband")


def probes(disk: Path, gpus: list[dict[str, str]]) -> Iterator[tuple[str, Probe]]:
    """What there is to look at.

    Args:
        disk: a folder of the file system that runs are written to.
        gpus: as :func:`samba_megatron.platform.nvidia_smi.query` lists them.
    """
    yield "node", _node
    yield "GPUs", partial(_gpus, gpus)
    if gpus:
        yield "driver", _driver
        yield "CUDA compiler", _nvcc
    yield "Slurm", _slurm
    yield "disk", partial(_disk, disk)
    yield "/dev/shm", partial(_shared_memory, len(gpus))
    yield "open files", partial(_limit, "open files", resource.RLIMIT_NOFILE, _LEAST_FILES, "-n")
    yield "processes", partial(_limit, "processes", resource.RLIMIT_NPROC, _LEAST_PROCESSES, "-u")
    yield "locked memory", _locked_memory


def _node() -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return Finding(AREA, "node", State.OK, f"{node_name()}, {cores} cores, {memory:.0f} GiB")


def _gpus(gpus: list[dict[str, str]]) -> Finding:
    if not gpus:
        meaning = "training runs on the CPU: good for trying things out, not for a model of size"
        return Finding(AREA, "GPUs", State.OFF, "none that nvidia-smi knows", meaning)
    names = [gpu.get("name", "?") for gpu in gpus]
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    found = f"{kinds}, {gpus[0].get('memory.total', '?')} MiB each"
    if problems := list(nvidia_smi.problems(gpus)):
        return Finding(AREA, "GPUs", State.POOR, found, "; ".join(problems))
    return Finding(AREA, "GPUs", State.OK, found)


def _driver() -> Finding:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    version = _says(query)
    return Finding(AREA, "driver", State.OK if version else State.POOR, version or "unknown")


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME")
    path = shutil.which("nvcc") or (home and shutil.which("nvcc", path=f"{home}/bin"))
    meaning = "make setup-gpu compiles kernels with it; training does not need it"
    if not path:
        return Finding(AREA, "CUDA compiler", State.OFF, "nvcc is not on PATH", meaning)
    release = _says([path, "--version"], last="release").rpartition("release ")[2]
    return Finding(AREA, "CUDA compiler", State.OK, release or path, meaning)


def _slurm() -> Finding:
    commands = ("sbatch", "srun", "squeue", "scontrol")
    missing = [name for name in commands if shutil.which(name) is None]
    if len(missing) == len(commands):
        meaning = "jobs are submitted from a node that has it; a run here starts with torchrun"
        return Finding(AREA, "Slurm", State.OFF, "not here", meaning)
    if missing:
        meaning, fix = f"{', '.join(missing)} not found", "apt-get install slurm-client"
        return Finding(AREA, "Slurm", State.POOR, "half of its commands", meaning, fix)
    if version := _says(["sbatch", "--version"]):
        return Finding(AREA, "Slurm", State.OK, version, "jobs with slurm/submit.py")
    meaning = "no cluster is configured here: jobs are submitted from a node of one"
    return Finding(AREA, "Slurm", State.OFF, "installed", meaning)


def _disk(folder: Path) -> Finding:
    folder = folder.resolve()
    if not os.access(folder, os.W_OK):
        meaning = "runs and checkpoints are written there: name another with --disk"
        return Finding(AREA, "disk", State.BROKEN, f"{folder} cannot be written to", meaning)
    free = shutil.disk_usage(folder).free / _GIB
    found, figures = f"{free:,.0f} GiB free in {folder}", {"free_gib": round(free, 1)}
    if free < _LEAST_DISK_GIB:
        meaning = "a checkpoint of 1.3B parameters takes about 20 GB: name another with --disk"
        return Finding(AREA, "disk", State.POOR, found, meaning, figures=figures)
    return Finding(AREA, "disk", State.OK, found, figures=figures)


def _shared_memory(gpus: int) -> Finding:
    size = shutil.disk_usage("/dev/shm").total / _GIB
    found, figures = f"{size:.2f} GiB", {"size_gib": round(size, 2)}
    if size >= _LEAST_SHARED_GIB:
        return Finding(AREA, "/dev/shm", State.OK, found, figures=figures)
    if gpus < 2:
        meaning = "small, which matters between several GPUs only"
        return Finding(AREA, "/dev/shm", State.OFF, found, meaning, figures=figures)
    meaning = "NCCL passes data between the GPUs of a node through it, and fails where it is full"
    fix = "docker run --shm-size=16g …, or mount -o remount,size=16G /dev/shm"
    return Finding(AREA, "/dev/shm", State.POOR, found, meaning, fix, figures)


def _limit(name: str, which: int, least: int, flag: str) -> Finding:
    soft, hard = resource.getrlimit(which)
    if soft == resource.RLIM_INFINITY or soft >= least:
        return Finding(AREA, name, State.OK, _amount(soft))
    meaning = f"loaders, checkpoint writers and ranks share it: {least:,} or more is safe"
    return Finding(AREA, name, State.POOR, _amount(soft), meaning, _raise_limit(flag, hard, least))


def _raise_limit(flag: str, hard: int, least: int) -> str:
    if hard == resource.RLIM_INFINITY or hard >= least:
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        return f"ulimit {flag} {wanted}"
    return f"as root: ulimit {flag} 65536, and for good in /etc/security/limits.conf"


def _locked_memory() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY:
        return Finding(AREA, "locked memory", State.OK, "unlimited")
    found = f"{soft / 2**20:,.0f} MiB"
    if not (_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())):
        meaning = "limited, which matters with InfiniBand only"
        return Finding(AREA, "locked memory", State.OFF, found, meaning)
    meaning = "InfiniBand pins memory: NCCL fails at the start, or falls back to TCP"
    return Finding(AREA, "locked memory", State.POOR, found, meaning, "ulimit -l unlimited")


def _amount(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _says(command: list[str], last: str = "") -> str:
    """The first line that a command prints, or the first with ``last`` in it; "" if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in result.stdout.splitlines() if last in line), "")
