"""What a cluster's administrator writes down once: partitions, containers, modules, environment.

One YAML file; ``slurm/sites/example.yaml`` shows every field. Found by ``--site``, else by the
environment variable SAMBA_SITE, else all fields have their defaults.
"""

import dataclasses
import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from samba_megatron.config.recipes import read_yaml
from samba_megatron.platform.errors import UserError

VARIABLE = "SAMBA_SITE"
_PLAIN: dict[type, tuple[Any, str]] = {
    str: (str, "text"),
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
}
"""Types of fields, with what YAML may give for them and how to say so."""
RUNTIMES = ("virtualenv", "pyxis", "apptainer")


@dataclass(frozen=True)
class Runtime:
    """What the ranks run in."""

    kind: str = "virtualenv"
    """``virtualenv``; ``pyxis`` (srun --container-image, enroot); ``apptainer``."""

    virtualenv: str | None = None
    """Folder of the environment; the one that submits when unset."""

    image: str | None = None
    """Container image; ``--container`` on the command line goes before it."""

    mounts: list[str] = field(default_factory=list)
    """Folders that the container sees besides the code and the run: ``/data`` or ``/a:/b``."""

    options: list[str] = field(default_factory=list)
    """Further options of ``apptainer exec``, or of srun for pyxis."""


@dataclass(frozen=True)
class NodeCheck:
    """The check of every node before the first step and after a failure."""

    enabled: bool = True
    """Check each node alone: GPUs, memory errors, clocks, disk, a matrix product."""

    across: bool = True
    """Measure the network between the nodes too, with one process a GPU."""

    count_gpus: bool = True
    """Every node must show as many GPUs as the job has on it."""

    min_free_gb: float | None = None
    """Room that the run folder's file system must have, in 10^9 bytes."""

    min_matmul_tflops: float | None = None
    """Rate of a matrix product that each GPU must reach; unset: they are compared."""


@dataclass(frozen=True)
class Site:
    """The settings of a cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    """Features of the nodes (``sbatch --constraint``), e.g. to have all of one kind."""

    gpus_per_node: int = 8
    gpu_memory_gib: float | None = None
    """Memory of a GPU, less what CUDA and NCCL take; a run that needs more is refused."""

    cpus_per_gpu: int | None = None
    """Cores for each rank; unset: an equal share of the node's is Slurm's to give."""

    restart: str = "requeue"
    """``requeue``: the same job again; ``chain``: jobs that wait for one another."""

    chain_length: int = 8
    """Jobs of a chain."""

    signal_minutes: float = 10.0
    """Before the time limit Slurm asks the run to save; give it twice what a save takes."""

    max_failures: int = 3
    """Ends without a new checkpoint, in a row, after which a run is held."""

    shared_paths: list[str] = field(default_factory=list)
    """Beginnings of paths that all nodes see. Unset, only /tmp and the like are refused."""

    modules: list[str] = field(default_factory=list)
    """``module load`` …"""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every rank: NCCL, UCX, libfabric."""

    scratch: str | None = None
    """A folder on each node's own disk, for temporary files (TMPDIR)."""

    sbatch_options: list[str] = field(default_factory=list)
    """Further #SBATCH lines, as ``--switches=4@2:00:00``."""

    srun_options: list[str] = field(default_factory=list)
    """Further options of each srun, as ``--mpi=none``."""

    runtime: Runtime = field(default_factory=Runtime)
    node_check: NodeCheck = field(default_factory=NodeCheck)


def load_site(reference: Path | None) -> Site:
    """The site's settings.

    Args:
        reference: the file; None takes the one that SAMBA_SITE names, if any.

    Raises:
        UserError: no such file, not YAML, or a key or value that does not fit.
    """
    path = reference or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if path is None:
        return Site()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        said = "--site" if reference else f"the environment variable {VARIABLE}"
        raise UserError(
            f"the site file {path} that {said} names cannot be read ({error.strerror}): "
            "slurm/sites/example.yaml is one to start from"
        ) from None
    source = f"site file {path}"
    values = read_yaml(text, source)
    site: Site = _build(Site, {} if values is None else values, source, "")
    _check(site, source)
    return site


def _build(kind: type, values: Any, source: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {prefix.rstrip('.') or 'it'} must hold fields, not {values!r}")
    types = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    built = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(names)}"
            raise UserError(f"{source}: {prefix}{key} is not a known field: {remedy}")
        wanted = types[key]
        if dataclasses.is_dataclass(wanted):
            assert isinstance(wanted, type)
            built[key] = _build(wanted, value, source, f"{key}.")
        else:
            built[key] = _fit(wanted, value, f"{source}: {prefix}{key}")
    return kind(**built)


def _fit(wanted: Any, value: Any, name: str) -> Any:
    """``value`` if it is of the type; whole numbers are numbers, and anything plain is text."""
    if wanted == list[str]:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise UserError(f"{name} is {value!r}: it must be a list of texts, as [a, b]")
    if wanted == dict[str, str]:
        if isinstance(value, dict) and not any(isinstance(v, dict | list) for v in value.values()):
            return {str(k): _plain(v) for k, v in value.items()}
        raise UserError(f"{name} is {value!r}: it must be names with values, as NCCL_DEBUG: WARN")
    if value is None and wanted not in _PLAIN:
        return None
    kinds, words = next(_PLAIN[kind] for kind in _PLAIN if wanted in (kind, kind | None))
    if isinstance(value, kinds) and isinstance(value, bool) == (kinds is bool):
        return value
    raise UserError(f"{name} is {value!r}: it must be {words}")


def _plain(value: Any) -> str:
    """An environment variable's text: YAML's ``true`` and ``null`` are meant as written."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(site: Site, source: str) -> None:
    for name, value, allowed in (
        ("restart", site.restart, ("requeue", "chain")),
        ("runtime.kind", site.runtime.kind, RUNTIMES),
    ):
        if value not in allowed:
            raise UserError(f"{source}: {name} is {value!r}: it must be {' or '.join(allowed)}")
    for name, number in (
        ("gpus_per_node", site.gpus_per_node),
        ("chain_length", site.chain_length),
        ("max_failures", site.max_failures),
        ("signal_minutes", site.signal_minutes),
    ):
        if number <= 0:
            raise UserError(f"{source}: {name} is {number}: it must be over 0")
    for option in (*site.sbatch_options, *site.srun_options):
        if not option.startswith("-"):
            raise UserError(f"{source}: {option!r} is no option: write it as --name=value")
