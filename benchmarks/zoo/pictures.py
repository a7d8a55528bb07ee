"""Pictures of results: panels of curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.zoo.results import Row, groups, mean

Curves = dict[str, tuple[Sequence[float], Sequence[float]]]  # x and y by name


class Panel(NamedTuple):
    curves: Curves
    x: str  # label
    y: str
    title: str = ""
    log: str = ""  # axes with a logarithmic scale: "x", "y" or "xy"


def curves(rows: list[Row], names: Sequence[str], x: str, y: str) -> Curves:
    """Mean of column y against column x, a curve for each value of the columns `names`."""
    found = Curves()
    for name, own in groups(rows, *names).items():
        points = sorted((at, mean(same, y)) for (at,), same in groups(own, x).items())
        found[", ".join(map(str, name))] = [at for at, _ in points], [value for _, value in points]
    return found


def draw(path: Path, grid: Sequence[Sequence[Panel]]) -> None:
    """Write a PNG with rows of panels, and the legend of the first one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(grid[0])
    size = (2 + 4 * columns, 3.5 * len(grid))
    figure, axes = plt.subplots(len(grid), columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, (panel for row in grid for panel in row), strict=True):
        for number, (name, (x, y)) in enumerate(panel.curves.items()):
            axis.plot(x, y, "o-" if number < 10 else "s--", markersize=3, label=name)  # there are 10 colors
        axis.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        if "x" in panel.log:
            axis.set_xscale("log", base=2)
        if "y" in panel.log:
            axis.set_yscale("log")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)
