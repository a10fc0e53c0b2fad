"""Draws a run's losses, so that a person sees at a glance whether it learns."""

from collections.abc import Sequence
from math import nan
from pathlib import Path
from typing import Any

from samba_megatron.platform.files import atomic_write

AVERAGED_STEPS = 20


def plot_losses(
    records: Sequence[dict[str, Any]],
    output: Path,
    title: str = "",
    mark: tuple[int, str] | None = None,
    reference: tuple[float, str] | None = None,
) -> None:
    """Writes a PNG of the training loss (each step, and a running mean) and the held-out losses.

    Args:
        records: objects of ``metrics.jsonl``, as ``read_metrics`` gives them.
        output: the picture's path; replaced whole or not at all.
        title: what stands above it.
        mark: a step to mark with a vertical line, and what happened there.
        reference: a loss (nats a token) to mark with a horizontal line, and its name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = _curve(records, "train")
    axes.plot(steps, losses, color="0.75", linewidth=0.8, label="training, each step")
    axes.plot(steps, _running_mean(losses), label=f"training, mean of {AVERAGED_STEPS} steps")
    for length in sorted({r["sequence_length"] for r in records if r["kind"] == "validation"}):
        axes.plot(*_curve(records, "validation", length), "o-", label=f"held out, {length} tokens")
    if mark:
        axes.axvline(mark[0], color="0.5", linestyle=":", label=f"{mark[1]} (step {mark[0]})")
    if reference:
        axes.axhline(reference[0], color="0.5", linestyle="--", label=reference[1])
    axes.set(xlabel="step", ylabel="loss, nats a token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(output, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def _curve(
    records: Sequence[dict[str, Any]], kind: str, length: int | None = None
) -> tuple[list[int], list[float]]:
    """Steps and losses in order; a loss that was not finite (null in the file) is a gap."""
    points = {
        record["step"]: nan if record["loss"] is None else record["loss"]
        for record in records
        if record["kind"] == kind and (length is None or record["sequence_length"] == length)
    }
    return sorted(points), [points[step] for step in sorted(points)]


def _running_mean(values: list[float]) -> list[float]:
    """Mean of each value and up to ``AVERAGED_STEPS - 1`` before it."""
    windows = (values[max(0, end - AVERAGED_STEPS) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]
