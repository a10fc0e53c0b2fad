"""Runs a test's comparison in Triton's interpreter, which runs kernels on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def interpret(module: str, *arguments: str) -> None:
    """Calls ``module.compare(*arguments)`` in a process of its own: Triton decides once how its
    kernels run. Fails where that fails; skipped without Triton."""
    pytest.importorskip("triton")
    listed = ", ".join(map(repr, arguments))
    code = f"from {module} import compare; compare({listed}); print('compared')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout == "compared\n", result.stderr
