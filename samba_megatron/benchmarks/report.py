"""The results as a person reads them: tables in Markdown, and a picture."""

from itertools import groupby
from pathlib import Path
from typing import Any

from samba_megatron.benchmarks.results import Results, Row
from samba_megatron.platform.files import atomic_write

_OURS, _PEERS = "C0", "0.6"


def markdown(results: Results) -> str:
    """All of it."""
    parts = [_head(results)]
    for shape, rows in groupby(results["kernels"], lambda row: row["shape"]):
        parts.append(f"Kernels at {shape} (batch × length):\n\n{_kernels(list(rows))}")
    if results["kernels"]:
        parts.append(_about_floors(results))
    if results["layers"]:
        shape = results["layers"][0]["shape"]
        parts.append(
            f"Layers at {shape}, forward and backward, each with its norm and residual:\n\n"
            + _layers(results["layers"])
        )
    if results["step"]:
        parts.append(
            f"Whole optimizer steps on {results['tokens']}; this project's with the recipe's own "
            "settings, which may keep documents apart, fla's on the same shape without documents. "
            "MFU counts model FLOPs, without recomputation, against the peak in bf16:\n\n"
            + _steps(results["step"])
        )
    parts.append(_not_measured(results))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results) -> str:
    machine, plan, peaks = results["machine"], results["plan"], results["peaks"]
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    stated = peaks["source"] == "stated"
    copy, product = machine["copy_bytes_per_second"], machine["product_flops_per_second"]
    rates = [
        f"a copy moves {copy / 1e9:,.0f} GB/s" + f" of {peaks['bytes'] / 1e9:,.0f} stated" * stated,
        f"a product reaches {product / 1e12:,.3g} TFLOP/s"
        + f" of {peaks['products'] / 1e12:,.0f} stated" * stated,
    ]
    lines = [
        f"{machine['device']} ({machine['node']}), {machine['date']}; {versions}.",
        f"Recipe {Path(plan['recipe']).name}, micro-batch {plan['batch']}, sequence "
        f"{plan['length']}, {plan['dtype']}. On this machine {' and '.join(rates)}.",
        *(f"{note[0].upper()}{note[1:]}." for note in results["notes"]),
    ]
    return "\n".join(lines)


def _about_floors(results: Results) -> str:
    rates = "what its maker states" if results["peaks"]["source"] == "stated" else "what it reached"
    return (
        "Times are medians, µs per 1000 tokens (least…most). The floor is the time in which the "
        f"device, at {rates}, could move the bytes, or do the products, the other operations or "
        "the exponentials, whichever takes longest; forward's and backward's add up. Bytes and "
        "FLOP are the least that the operation needs, whatever a kernel does. The loss makes its "
        "gradients in its forward pass: alone, that is timed without any."
    )


def _kernels(rows: list[Row]) -> str:
    titles = ["operation", "kernel", "forward", "forward + backward", "GB/s", "TFLOP/s"]
    titles += ["of the floor: forward", "both", "bound by"]
    return table(titles, [_kernel_cells(row) for row in rows])


def _kernel_cells(row: Row) -> list[str]:
    return [
        row["operation"],
        row["kernel"],
        _per_thousand(row["forward_ms"], row["tokens"]),
        _per_thousand(row["both_ms"], row["tokens"]),
        _figure(row["both_bytes_per_second"] / 1e9),
        _figure(row["both_flops_per_second"] / 1e12),
        _percent(row["forward_share_of_floor"]),
        _percent(row["both_share_of_floor"]),
        row["both_bound"],
    ]


def _per_thousand(milliseconds: list[float], tokens: int) -> str:
    median, low, high = (value * 1e6 / tokens for value in milliseconds)
    return f"{_figure(median)} ({_figure(low)}…{_figure(high)})"


def _layers(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        median, low, high = (_figure(value) for value in row["both_ms"])
        rate = f"{row['tokens_per_second']:,.0f}"
        cells.append(
            [row["layer"], row["kernel"], f"{median} ({low}…{high})", rate, _percent(row["mfu"])]
        )
    return table(["layer", "code", "ms", "tokens/s", "MFU"], cells)


def _steps(rows: list[Row]) -> str:
    cells = []
    for row in rows:
        low, high = row["tokens_per_second_range"]
        cells.append(
            [
                row["kernel"],
                f"{row['tokens_per_second']:,.0f} ({low:,.0f}…{high:,.0f})",
                _percent(row["mfu"]),
                f"{row['memory_gib']:.1f}",
                f"{row['micro_batch_size']} × {row['sequence_length']}",
                f"{row['losses'][0]:.2f} → {row['losses'][-1]:.2f}",
            ]
        )
    return table(["code", "tokens/s", "MFU", "GiB", "batch", "loss"], cells)


def _not_measured(results: Results) -> str:
    """One line for each reason, with the cases that it holds for, whatever their shapes."""
    by_reason: dict[tuple[str, str], dict[str, None]] = {}
    for case in results["not_measured"]:
        name = case["case"].partition(" at ")[0]
        by_reason.setdefault((case["kind"], case["why"]), {})[name] = None
    return "\n".join(f"- {kind}: {'; '.join(c)}: {why}" for (kind, why), c in by_reason.items())


def table(titles: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned, to be read as it is too."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def plot(results: Results, path: Path) -> None:
    """Writes a PNG of bars: tokens/s of steps and layers, and the kernels' share of the floor."""
    from matplotlib.figure import Figure

    shape = results["plan"]["shapes"][0]
    kernels = [row for row in results["kernels"] if row["shape"] == shape]
    panels = [
        ("Whole optimizer step", "tokens/s", _bars(results["step"], "", "tokens_per_second")),
        ("Layers", "tokens/s", _bars(results["layers"], "layer", "tokens_per_second")),
        (
            f"Kernels at {shape}, forward and backward",
            "floor / time, %",
            _bars(kernels, "operation", "both_share_of_floor", 100),
        ),
    ]
    panels = [panel for panel in panels if panel[2]]
    heights = [len(bars) + 2 for _, _, bars in panels] or [1]
    figure = Figure(figsize=(9, 0.32 * sum(heights) + 0.8), layout="constrained")
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, {Path(results['plan']['recipe']).name}")
    if panels:
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for each, (title, unit, bars) in zip(axes, panels, strict=True):
            _draw(each, title, unit, bars)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


Bar = tuple[str, float, bool]
"""Name, value, whether it is a peer's."""


def _bars(rows: list[Row], group: str, value: str, factor: float = 1) -> list[Bar]:
    names = [f"{row[group]}: {row['kernel']}" if group else row["kernel"] for row in rows]
    return [(n, factor * row[value], row["peer"]) for n, row in zip(names, rows, strict=True)]


def _draw(axes: Any, title: str, unit: str, bars: list[Bar]) -> None:
    names, values, peers = zip(*bars, strict=True)
    colours = [_PEERS if peer else _OURS for peer in peers]
    drawn = axes.barh(range(len(bars)), values, color=colours, height=0.7)
    labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), names, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.15 * max(values))
    axes.xaxis.set_major_formatter("{x:,.0f}" if max(values) >= 10 else "{x:g}")
    axes.set_xlabel(unit)
    axes.set_title(title + (" (grey: other packages)" if any(peers) else ""), fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
