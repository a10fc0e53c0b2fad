"""Which packages are installed, in which version, and what each is good for or costs by its lack.

Versions are read, nothing is imported: whether a package works is tried by
:mod:`samba_megatron.ops.trials`.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from samba_megatron.platform.findings import Finding, Probe, State

AREA = "packages"
_SETUP = "make setup"
_SETUP_GPU = "make setup-gpu"


@dataclass(frozen=True)
class _Package:
    """A distribution, what it enables, and what it costs to do without."""

    name: str
    enables: str
    lack: str
    fix: str
    lack_is: State = State.POOR
    needs_gpu: bool = False


_NEEDED = (
    _Package("torch", "tensors, autograd, collectives", "nothing runs", _SETUP, State.BROKEN),
    _Package(
        "megatron-core",
        "parallel layers, distributed optimizer, sharded checkpoints",
        "nothing trains",
        _SETUP,
        State.BROKEN,
    ),
    _Package("numpy", "datasets", "nothing reads data", _SETUP, State.BROKEN),
    _Package("transformers", "tokenizers, Hugging Face export and import", "no export", _SETUP),
    _Package("gigatoken", "fast tokenising", "preprocessing does not start", _SETUP),
    _Package("datatrove", "corpora from many inputs", "preprocessing does not start", _SETUP),
)
_KERNELS = (
    _Package(
        "transformer-engine",
        "fused norm and linear, cuDNN attention, fused AdamW, FP8 (1.3B on an H200: 73,133 to "
        "75,649 tokens/s instead of 56,846 in bf16)",
        "no FP8 (1.3B on an H200: 56,846 tokens/s at most instead of 75,649), no fused layers",
        _SETUP_GPU,
        needs_gpu=True,
    ),
    _Package(
        "causal-conv1d",
        "the convolution's CUDA kernel",
        "the convolution runs in plain torch, more slowly",
        _SETUP_GPU,
        needs_gpu=True,
    ),
    _Package(
        "mamba-ssm",
        "the scan where the fused one cannot run (compute capability below 8.0)",
        "nothing where the fused scan runs, which is faster (1.3B on an H200: 56,846 tokens/s "
        "against 47,201)",
        _SETUP_GPU,
        State.OFF,
        needs_gpu=True,
    ),
    _Package(
        "flash-attn",
        "windowed attention of the local layers",
        "nothing where Transformer Engine's attention runs; else plain torch's, more slowly",
        _SETUP_GPU,
        State.OFF,
        needs_gpu=True,
    ),
    _Package(
        "apex",
        "fused AdamW where there is no Transformer Engine",
        "nothing where Transformer Engine is; else torch's AdamW",
        "",
        State.OFF,
        needs_gpu=True,
    ),
)
_EXTRAS = (
    _Package("mlflow", "tracking beside metrics.jsonl", "no MLflow", _SETUP, State.OFF),
    _Package(
        "nvidia-modelopt",
        "tools/quantize.py, for an exported model; training does not use it",
        "no quantising",
        _SETUP,
        State.OFF,
    ),
)


def probes(pins: Mapping[str, str], has_gpu: bool) -> Iterator[tuple[str, Probe]]:
    """What there is to look at.

    Args:
        pins: the versions that this project is tested with, by distribution name.
        has_gpu: whether kernels for a GPU would be of use here.
    """
    yield "Python", _python
    for package in (*_NEEDED, *_KERNELS, *_EXTRAS):
        yield package.name, _probe(package, pins.get(package.name), has_gpu)


def _python() -> Finding:
    found = f"{sys.version.split()[0]} ({sys.executable})"
    if sys.version_info[:2] == (3, 12):
        return Finding(AREA, "Python", State.OK, found)
    meaning = "Python 3.12 is what the packages are pinned for"
    return Finding(AREA, "Python", State.BROKEN, found, meaning, _SETUP)


def _probe(package: _Package, pin: str | None, has_gpu: bool) -> Probe:
    def probe() -> Finding:
        found = _version(package.name)
        if found is None:
            return _absent(package, has_gpu)
        if pin is not None and found.split("+")[0] != pin:
            text = f"{found}, tested with {pin}"
            return Finding(AREA, package.name, State.POOR, text, package.enables, package.fix)
        return Finding(AREA, package.name, State.OK, found, package.enables)

    return probe


def _absent(package: _Package, has_gpu: bool) -> Finding:
    if package.needs_gpu and not has_gpu:
        return Finding(AREA, package.name, State.OFF, "not installed", "there is no GPU for it")
    lack = f"without it: {package.lack}"
    fix = "" if package.lack_is is State.OFF else package.fix
    return Finding(AREA, package.name, package.lack_is, "not installed", lack, fix)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
