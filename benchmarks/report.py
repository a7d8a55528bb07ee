"""Output of results: a table for the terminal, a CSV, a plot."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Format a table: the first column left-aligned, the others right-aligned, floats with three digits."""
    cells = [list(map(_cell, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one line per row, with the columns of the first row."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def picture(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plot one panel per series: the rate of each implementation against the length, and the roofline as a dashed
    line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(row["series"] for row in rows))
    columns = min(len(panels), 4)
    figure, axes = plt.subplots(
        math.ceil(len(panels) / columns), columns, squeeze=False, layout="constrained",
        figsize=(4 * columns, 3 * math.ceil(len(panels) / columns)),
    )  # fmt: skip
    for panel, axis in zip(panels, axes.flat, strict=False):
        inside = [row for row in rows if row["series"] == panel]
        for name in dict.fromkeys(row["implementation"] for row in inside):
            own = [row for row in inside if row["implementation"] == name]
            axis.plot([row["length"] for row in own], [row["rate"] for row in own], "o-", label=name)
        bounds = {row["length"]: row["bound"] for row in inside if row["bound"]}
        axis.plot(bounds.keys(), bounds.values(), "k--", label="bound")
        axis.set_title(panel, fontsize="medium")
        axis.set_xscale("log", base=2)
        axis.set_ylabel(inside[0]["unit"])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize="small")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    plt.close(figure)
