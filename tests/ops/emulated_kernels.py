"""The fused scan's kernels on a CPU: compiled by g++ with fibres in the place of threads."""

import ctypes
import shutil
import subprocess
from dataclasses import astuple
from pathlib import Path

from samba_megatron.ops.selective_scan.fused import source
from samba_megatron.ops.selective_scan.fused.layout import Variant

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")


def build(variant: Variant, folder: Path) -> ctypes.CDLL:
    """Compiles a variant's kernels; what is in `folder` already is taken."""
    name = "_".join(["emulated", *(str(int(value)) for value in astuple(variant))])
    library = folder / f"{name}.so"
    if not library.exists():
        kernels = Path(source.__file__).parent
        parts = [
            HERE / "emulated_primitives.h",
            *(kernels / part for part in source.PARTS[1:]),
            HERE / "emulated_launch.h",
        ]
        text = folder / f"{name}.cpp"
        text.write_text("".join(f'#include "{part}"\n' for part in parts))
        definitions = [f"-D{definition}" for definition in variant.definitions()]
        options = ["-O1", "-std=c++17", "-shared", "-fPIC", "-w", *definitions]
        subprocess.run([str(COMPILER), *options, "-o", str(library), str(text)], check=True)
    return ctypes.CDLL(str(library))


class EmulatedKernels:
    """Stands where a GPU's kernels would; `workers` blocks are said to run at once."""

    def __init__(self, variant: Variant, folder: Path, workers: int) -> None:
        self.variant = variant
        self.library = build(variant, folder)
        self.count = workers
        self.launched: list[str] = []

    def workers(self, kernel: str) -> int:
        return self.count

    def launch(self, kernel: str, blocks: int, arguments: ctypes.Structure) -> None:
        self.launched.append(kernel)
        getattr(self.library, f"launch_{kernel}")(blocks, ctypes.byref(arguments))
