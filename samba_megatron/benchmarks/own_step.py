"""Whole optimizer steps of this project, measured by a command that trains recipes and reports.

The command is given (``tools/measure_training.py``), so that nothing here knows of tools: it goes
through the entry point of training, in processes of its own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from samba_megatron.benchmarks.plan import Plan
from samba_megatron.platform.findings import Finding, State
from samba_megatron.tracking.metrics import read_metrics

AREA = "step"
_DOCUMENTS, _DOCUMENT = 64, 4
"""Documents of the random tokens, and how many sequences long each is: few samples have two."""


def measure(
    tool: Path,
    plan: Plan,
    precisions: Sequence[str],
    folder: Path,
    stop: float,
    notice: Callable[[str], None],
) -> Iterator[Finding]:
    """A finding for each precision.

    Args:
        tool: the command's file.
        plan: recipe, shape and steps.
        precisions: names that the command knows.
        folder: for the runs; what an earlier benchmark left in it is removed.
        stop: moment (of the monotonic clock) at which what goes on is ended.
        notice: gets the command's lines as it prints them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    cases = folder / "cases.yaml"
    cases.write_text(json.dumps([_case(plan, precision) for precision in precisions]))  # YAML too
    data = _write_random_tokens(folder / "random", plan)
    words = [
        *(sys.executable, str(tool), "--cases", str(cases), "--steps", str(plan.steps)),
        *("--data-path", data, "--output", str(folder), "--quick"),
    ]
    if stop != float("inf"):
        words += ["--time-limit", str(max(stop - time.monotonic(), 1.0))]
    log = folder / "measure_training.log"
    code = _run(words, log, notice)
    report = folder / "measured.json"
    rows = json.loads(report.read_text()) if report.is_file() else []
    for precision, row in zip(precisions, rows, strict=False):
        yield _finding(plan, precision, row, folder)
    for precision in precisions[len(rows) :]:
        why = f"it ended with code {code}: see {log}" if code else "left out for --time-limit"
        yield Finding(AREA, _title(precision), State.BROKEN if code else State.OFF, why)


def _run(words: list[str], log: Path, notice: Callable[[str], None]) -> int:
    """Its exit code; what it prints goes to the log too."""
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            with log.open("w", encoding="utf-8") as output:
                for line in process.stdout:
                    output.write(line)
                    notice(line.rstrip())
        except BaseException:
            process.send_signal(signal.SIGINT)  # it ends the runs that it has started
            raise
    return process.returncode


def _case(plan: Plan, precision: str) -> dict[str, Any]:
    return {
        "recipe": plan.recipe,
        "precision": precision,
        "micro_batch_size": plan.batch,
        "sequence_length": plan.length,
    }


def _write_random_tokens(prefix: Path, plan: Plan) -> str:
    """Uniform over the vocabulary: what the tokens are does not matter for the time of a step."""
    import numpy as np

    from samba_megatron.data.indexed import IndexedWriter

    vocabulary = plan.model().vocab_size
    dtype = np.uint16 if vocabulary <= 2**16 else np.int32
    draw = np.random.default_rng(0).integers
    with IndexedWriter(prefix, dtype) as writer:
        for _ in range(_DOCUMENTS):
            writer.add_document(draw(0, vocabulary, _DOCUMENT * plan.length, dtype=dtype))
        writer.finish()
    return str(prefix)


def _title(precision: str) -> str:
    return f"samba_megatron, {precision}"


def _finding(plan: Plan, precision: str, row: dict[str, Any], folder: Path) -> Finding:
    title = _title(precision)
    figures: dict[str, Any] = {"kernel": title, "peer": False}
    if "error" in row:
        ran_out = row["error"] == "the time was over"
        why = "left out for --time-limit" if ran_out else row["error"]
        return Finding(AREA, title, State.OFF if ran_out else State.BROKEN, why, figures=figures)
    records = read_metrics(folder / row["name"] / "metrics.jsonl", "train")
    rates = [record["tokens_per_second"] for record in records[len(records) // 2 :]]
    figures |= {
        "micro_batch_size": plan.batch,
        "sequence_length": plan.length,
        "tokens_per_second": row["tokens_per_second"],
        "tokens_per_second_range": [min(rates), max(rates)],
        "steps": len(rates),
        "flops_per_second": row["tflops_per_device"] * 1e12,
        "memory_gib": row["memory_gib"],
        "memory_reserved_gib": row["memory_reserved_gib"],
        "losses": row["losses"],
        "parameters": row["parameters"],
        "kernels": row["kernels"],
    }
    found = f"{row['tokens_per_second']:,.0f} tokens/s, {row['memory_gib']:.1f} GiB"
    return Finding(AREA, title, State.OK, found, figures=figures)
