"""Faults for the ranks of the tests' jobs. Copied as ``sitecustomize.py`` into a folder of the run,
which is on the ranks' path: Python imports a module of that name by itself.

Files in that folder say what happens when a rank asks for the next batch: ``hang.3`` and
``raise.3`` are for rank 3; with ``slow`` all ranks take their time, so that a run does not end
before Slurm's clock has moved. SAMBA_TEST_FULL_DISK names a node whose disk looks full.
"""

import importlib.abc
import importlib.machinery
import os
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

FOLDER, RANK = Path(__file__).parent, os.environ.get("RANK")
STREAM = "samba_megatron.data.stream"


def break_stream(module: Any) -> None:
    """Wraps the one call that every rank makes at every step."""
    healthy = module.SampleStream.next_global_batch

    def faulty(self: Any, size: int) -> Any:
        if (FOLDER / "slow").exists():
            time.sleep(0.7)
        if (FOLDER / f"hang.{RANK}").exists():
            time.sleep(10_000)
        if (FOLDER / f"raise.{RANK}").exists():
            raise ValueError("this rank's data are broken")
        return healthy(self, size)

    module.SampleStream.next_global_batch = faulty


class BreakAfterImport(importlib.abc.MetaPathFinder):
    """Finds the module as always, and breaks it once it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == STREAM else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_break(module: Any) -> None:
            load(module)
            break_stream(module)

        spec.loader.exec_module = load_and_break  # type: ignore[method-assign]
        return spec


if RANK is not None:
    sys.meta_path.insert(0, BreakAfterImport())

if os.environ.get("SAMBA_TEST_FULL_DISK") == os.environ.get("SLURMD_NODENAME", "?"):
    _Usage = namedtuple("_Usage", "total used free")
    shutil.disk_usage = lambda path: _Usage(1, 1, 0)  # type: ignore
