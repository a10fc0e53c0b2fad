"""What NVIDIA's own tools say of this node's GPUs: memory, errors, throttling.

Only the standard library; a node without the tools has nothing to say. Fields that a driver does
not know are left out, so that old and new drivers both serve.
"""

import csv
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

FIELDS = (
    "index",
    "name",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.failure",
    "remapped_rows.pending",
    "clocks_throttle_reasons.hw_thermal_slowdown",
    "clocks_throttle_reasons.hw_power_brake_slowdown",
)
_ALWAYS_KNOWN = FIELDS[:8]
_THROTTLING = {
    "clocks_throttle_reasons.hw_thermal_slowdown": "is slowed down by its temperature",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "is slowed down by the power supply",
}
_MOST_MEMORY_IN_USE_MIB = 4096
_UNKNOWN = ("", "[N/A]", "N/A", "[Not Supported]", "[Unknown Error]")


def query() -> list[dict[str, str]]:
    """A dict of :data:`FIELDS` for each GPU of this node; [] without ``nvidia-smi``.

    A driver that does not know one of them refuses all: then those that every driver knows.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    for fields in (FIELDS, _ALWAYS_KNOWN):
        options = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        if gpus := parse(_run(["nvidia-smi", *options]), fields):
            return gpus
    return []


def parse(output: str, fields: Sequence[str] = FIELDS) -> list[dict[str, str]]:
    """What ``nvidia-smi`` prints of the fields, without what it does not know."""
    rows = csv.reader(output.splitlines(), skipinitialspace=True)
    return [
        {name: value for name, value in zip(fields, row, strict=True) if value not in _UNKNOWN}
        for row in rows
        if len(row) == len(fields)
    ]


def problems(gpus: list[dict[str, str]]) -> Iterator[str]:
    """A sentence for whatever makes a GPU unfit for work."""
    most = max((_number(gpu, "memory.total") for gpu in gpus), default=0)
    for gpu in gpus:
        name = f"GPU {gpu.get('index', '?')}"
        if (errors := _number(gpu, "ecc.errors.uncorrected.volatile.total")) > 0:
            yield f"{name} has {errors} uncorrected memory errors since the driver was loaded"
        if gpu.get("remapped_rows.failure") == "Yes":
            yield f"{name} could not remap a broken row of its memory"
        if gpu.get("remapped_rows.pending") == "Yes":
            yield f"{name} must be reset to remap a broken row of its memory"
        for field, sentence in _THROTTLING.items():
            if gpu.get(field) == "Active":
                yield f"{name} {sentence}"
        if (total := _number(gpu, "memory.total")) < most:
            yield f"{name} has {total} MiB of memory, others here have {most}"
        if (used := _number(gpu, "memory.used")) > _MOST_MEMORY_IN_USE_MIB:
            yield f"{name} has {used} MiB of its memory in use by another program"


def dcgm_problems(seconds: float = 60.0) -> Iterator[str]:
    """What DCGM's short diagnosis finds; nothing where ``dcgmi`` is not installed."""
    if shutil.which("dcgmi") is None:
        return
    output = _run(["dcgmi", "diag", "--run", "1", "--json"], seconds)
    try:
        found = json.loads(output[output.find("{") :])
    except json.JSONDecodeError:
        return  # its service is not running: that is no fault of a GPU
    yield from (f"dcgmi diag: {name} failed" for name in failed_tests(found))


def failed_tests(content: Any, name: str = "a test") -> Iterator[str]:
    """Names of the tests that failed in dcgmi's JSON, whichever version's it is."""
    if isinstance(content, list):
        for item in content:
            yield from failed_tests(item, name)
    elif isinstance(content, dict):
        name = str(content.get("name") or content.get("test_name") or name)
        if str(content.get("status", "")).lower() == "fail":
            yield name
        for item in content.values():
            yield from failed_tests(item, name)


def _number(gpu: dict[str, str], field: str) -> int:
    text = gpu.get(field, "")
    return int(text) if text.isdigit() else 0


def _run(command: list[str], seconds: float = 30.0) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
