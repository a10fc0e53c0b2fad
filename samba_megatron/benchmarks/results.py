"""What was found, made comparable: rates, shares of the floor and of the peak."""

from collections.abc import Iterable
from typing import Any

from samba_megatron.benchmarks.plan import PARTS, Plan
from samba_megatron.benchmarks.roofline import (
    Peaks,
    floor_of_both,
    floor_of_pass,
    measured_peaks,
    stated_peaks,
)
from samba_megatron.ops.cost import Passes, Work
from samba_megatron.platform.findings import Finding, State

Results = dict[str, Any]
Row = dict[str, Any]


def collect(plan: Plan, machine: Row, findings: Iterable[Finding], notes: list[str]) -> Results:
    """The content of ``benchmark.json``.

    Args:
        plan: what was to be measured.
        machine: the figures of the machine.
        findings: of all cases.
        notes: further sentences for the reader.
    """
    stated = stated_peaks(machine["device"], plan.dtype)
    peaks = stated or measured_peaks(
        machine["copy_bytes_per_second"], machine["product_flops_per_second"]
    )
    results: Results = {
        "machine": machine,
        "plan": {**vars(plan), "shapes": [str(shape) for shape in plan.shapes()]},
        "tokens": "random tokens, uniform over the vocabulary",
        "peaks": vars(peaks),
        **{part: [] for part in PARTS},
        "not_measured": [],
        "notes": notes,
    }
    for finding in findings:
        if finding.state is State.OK:
            results[finding.area].append(_row(finding, peaks, stated))
        else:
            kind = "failed" if finding.state is State.BROKEN else "left out"
            results["not_measured"].append(
                {"part": finding.area, "case": finding.name, "kind": kind, "why": finding.found}
            )
    return results


def _row(finding: Finding, peaks: Peaks, stated: Peaks | None) -> Row:
    if finding.area == "kernels":
        return kernel_row(finding.figures, peaks)
    mfu = finding.figures["flops_per_second"] / stated.products if stated else None
    return {**finding.figures, "mfu": mfu}


def kernel_row(figures: Row, peaks: Peaks) -> Row:
    """A kernel's times with its floors; of both passes, and of the forward pass alone."""
    passes = Passes(Work(**figures["forward_work"]), Work(**figures["backward_work"]))
    row = {name: value for name, value in figures.items() if not name.endswith("_work")}
    for name, work, floor in (
        ("forward", passes.forward, floor_of_pass(passes.forward, peaks)),
        ("both", passes.forward + passes.backward, floor_of_both(passes, peaks)),
    ):
        seconds = 1e-3 * figures[f"{name}_ms"][0]
        row |= {
            f"{name}_bytes_per_second": work.bytes / seconds,
            f"{name}_flops_per_second": (work.products + work.flops + work.exponentials) / seconds,
            f"{name}_floor_ms": 1e3 * floor.seconds,
            f"{name}_share_of_floor": floor.seconds / seconds,
            f"{name}_bound": floor.bound,
        }
    return row
