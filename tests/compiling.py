"""torch.compile in tests. A run of megatron on a CPU switches it off in its process, and in those
that are started from there (``platform/cpu_shim.py``); it then returns what it was given."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tests.ranks import ROOT


def environment() -> dict[str, str]:
    """This process's, for one in which torch compiles."""
    return {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}


def call_apart(module: str, function: str, *arguments: str) -> None:
    """Calls ``module.function(*arguments)`` in a process of its own, in which torch compiles."""
    listed = ", ".join(map(repr, arguments))
    code = f"from {module} import {function}; {function}({listed}); print('returned')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert result.stdout.endswith("returned\n"), result.stderr


@contextmanager
def must_compile() -> Iterator[None]:
    """Inside, torch compiles something."""
    from torch._dynamo.utils import counters

    counters.clear()
    yield
    assert counters["stats"]["unique_graphs"], "torch.compile was off"
