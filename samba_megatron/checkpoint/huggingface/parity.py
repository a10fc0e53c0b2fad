"""Whether an export is the same model as its checkpoint: every bit of every tensor, then logits.

Each side runs in a process of its own, so that this one stays small, only one model is in memory
at a time, and neither library sees what the other does to torch.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import samba_megatron
from samba_megatron.checkpoint.huggingface import parity_sides
from samba_megatron.platform.errors import UserError


def compare(
    checkpoint: Path,
    folder: Path,
    dtype: str,
    what: Literal["logits", "tensors"],
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """The parity report.

    Args:
        checkpoint: the checkpoint that was exported.
        folder: the export.
        dtype: its dtype (``bfloat16``).
        what: ``tensors`` leaves the models out: the files are compared, not what is loaded.
        notice: gets sentences for people.
    """
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "dtype": dtype, "compared": what}
    if what == "tensors":
        report["tensors"] = parity_sides.compare_files(checkpoint, folder, dtype)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            notice("computing the checkpoint's logits")
            _run_side("checkpoint", checkpoint, folder, dtype, scratch)
            notice("reloading the export with transformers and comparing")
            _run_side("export", checkpoint, folder, dtype, scratch)
            report |= json.loads((Path(scratch) / parity_sides.REPORT).read_text())
    sound = not report["tensors"]["different"]
    report["passed"] = sound and report.get("logits", {"passed": True})["passed"]
    return report


def summary(report: dict[str, Any]) -> str:
    """The report in a line."""
    tensors = report["tensors"]
    text = f"parity {'passed' if report['passed'] else 'FAILED'}: "
    if tensors["different"]:
        text += f"{len(tensors['different'])} of {tensors['compared']} tensors differ"
    else:
        text += f"{tensors['compared']} tensors are equal bit by bit"
    if "logits" in report:
        logits = report["logits"]
        text += (
            f"; fp32 logits differ by at most {logits['max_abs_difference']:.2e} "
            f"(allowed {logits['tolerance']:.0e})"
        )
        if "in_bfloat16" in logits:
            half = logits["in_bfloat16"]
            text += (
                f"; computed in bf16 by at most {half['max_abs_difference']:.2e}, on average "
                f"{half['mean_abs_difference']:.2e}"
            )
    else:
        text += "; logits were not compared"
    return text


def _run_side(side: str, *arguments: object) -> None:
    """Runs a side in a new process, on the CPU, and in no world that this one is part of."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    environment = {name: value for name, value in os.environ.items() if name not in launcher}
    root = str(Path(samba_megatron.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, "-m", parity_sides.__name__, side, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == -signal.SIGKILL:
        raise UserError(
            "the comparison was killed, as happens when memory runs out: the whole model must fit "
            "in fp32 (4 bytes a parameter), or compare with --parity tensors"
        )
    if result.returncode != 0:
        raise RuntimeError(f"the {side} could not be run for comparison:\n{result.stderr[-4000:]}")
