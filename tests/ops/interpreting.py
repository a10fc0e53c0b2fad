"""Runs a test's comparison in Triton's interpreter, which runs kernels on CPU tensors."""

import subprocess
import sys

import pytest

from tests.compiling import environment
from tests.ranks import ROOT


def interpret(module: str, *arguments: str) -> None:
    """Calls ``module.compare(*arguments)`` in a process of its own: Triton decides once how its
    kernels run. Fails where that fails; skipped without Triton."""
    pytest.importorskip("triton")
    listed = ", ".join(map(repr, arguments))
    code = f"from {module} import compare; compare({listed}); print('compared')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment() | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "compared\n", result.stderr
