"""Results as a person reads them: tables and pictures."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from samba_megatron.platform.files import atomic_write

if TYPE_CHECKING:
    from rich.table import Table

Results = dict[str, Any]


def table(results: Results) -> "Table":
    """What is in ``results.json``, as a table."""
    from rich.table import Table

    suite = results["suite"]
    made = Table(
        title=f"{suite}: {results['cases']} of {results['of']} cases", title_justify="left"
    )
    columns, rows = {"passkey": _passkey, "phonebook": _phonebook, "perplexity": _perplexity}[
        suite
    ](results)
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def _passkey(results: Results) -> tuple[list[str], list[list[str]]]:
    cells = results["accuracy_by_depth"]
    depths = list(next(iter(cells.values())))
    rows = [
        [f"{int(length):,}", _percent(results["accuracy"][length])]
        + [_percent(results["digits"][length])]
        + [_percent(cells[length][depth]) for depth in depths]
        for length in cells
    ]
    return ["length", "all", "digits", *(f"at {depth}" for depth in depths)], rows


def _phonebook(results: Results) -> tuple[list[str], list[list[str]]]:
    tokens = results["tokens"]
    rows = [
        [pairs, "–" if tokens[pairs] is None else f"{tokens[pairs]:,.0f}", _percent(accuracy)]
        for pairs, accuracy in results["accuracy"].items()
    ]
    return ["pairs", "tokens", "correct"], rows


def _perplexity(results: Results) -> tuple[list[str], list[list[str]]]:
    last = results["perplexity_of_last_stretch"]
    rows = [
        [f"{int(length):,}", _number(value), _number(last[length])]
        for length, value in results["perplexity"].items()
    ]
    return ["context", "perplexity", "since the length before"], rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3f}"


def plot(results: Results, output: Path) -> None:
    """Writes a PNG: a heat map of passkeys, else a curve over the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if results["suite"] == "passkey":
        _heat_map(figure, axes, results)
    else:
        _curve(axes, results)
    with atomic_write(output, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)


def _heat_map(figure: Any, axes: Any, results: Results) -> None:
    """Length from left to right, depth from top to bottom; green is right, grey was not asked."""
    import numpy as np

    cells = results["accuracy_by_depth"]
    lengths, depths = list(cells), list(next(iter(cells.values())))
    shares = [[cells[length][depth] for length in lengths] for depth in depths]
    values = np.array(
        [[np.nan if share is None else share for share in row] for row in shares], dtype=float
    )
    image = axes.imshow(values, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("0.85")
    axes.set_xticks(range(len(lengths)), [_short(int(length)) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f} %" for depth in depths])
    axes.set(xlabel="tokens of the prompt", ylabel="depth of the key", title="passkey retrieval")
    figure.colorbar(image, label="share of keys found")


def _curve(axes: Any, results: Results) -> None:
    phonebook = results["suite"] == "phonebook"
    figures = results["accuracy" if phonebook else "perplexity"]
    known = [(x, y) for x, y in figures.items() if y is not None]
    places = [results["tokens"][x] if phonebook else int(x) for x, _ in known]
    axes.plot(places, [y for _, y in known], "o-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [_short(place) for place in places], rotation=45, minor=False)
    axes.set(
        xlabel="tokens of the prompt" if phonebook else "tokens of the context",
        ylabel="share of numbers found" if phonebook else "perplexity",
        title=results["suite"],
    )
    if phonebook:
        axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)


def _short(length: float) -> str:
    """4096 → 4K, 1048576 → 1M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length >= size:
            return f"{length / size:.3g}{letter}"
    return f"{length:.0f}"
