"""The results of an experiment: a CSV that survives a killed run, tables in Markdown, the best learning rate.

A row is a point, the settings of a measurement, with what was measured, or with an error.
"""

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Point = dict[str, str | int | float]
Row = dict[str, Any]


class Results:
    """The rows of an experiment in a CSV, appended point by point. Failed points are forgotten when it is opened."""

    def __init__(self, path: Path, settings: Sequence[str], measures: Sequence[str]) -> None:
        """settings: names of a point's settings. Raises ValueError if the file has other columns."""
        self.path, self.settings, self.columns = path, list(settings), [*settings, *measures, "error"]
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # the last line of a killed run may be incomplete
        reader = csv.DictReader(io.StringIO(whole))
        if whole and reader.fieldnames != self.columns:
            raise ValueError(f"{path}: its columns are not {', '.join(self.columns)}; move it, or choose another --out")
        self.rows: list[Row] = [
            {name: _parse(cell) for name, cell in row.items()} for row in reader if not row["error"]
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(_lines([dict(zip(self.columns, self.columns, strict=True)), *self.rows], self.columns))
        temporary.replace(path)

    def has(self, point: Point) -> bool:
        """Whether the point was measured."""
        return any(all(row[name] == point[name] for name in self.settings) for row in self.rows)

    def add(self, point: Point, found: dict[str, float] | None, error: str = "") -> None:
        """Append a point, with its measurements or with the error, and write it to the disk."""
        row = {**point, **(found or {}), "error": error}
        if not error:
            self.rows.append({name: _parse(str(row[name])) for name in self.columns})
        with self.path.open("a", newline="") as file:
            file.write(_lines([row], self.columns))
            file.flush()
            os.fsync(file.fileno())


def _parse(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell


def _lines(rows: Iterable[Row], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def mean(rows: Sequence[Row], measure: str) -> float:
    """The mean of a measure over rows, such as those of several seeds."""
    return sum(row[measure] for row in rows) / len(rows)


def span(rows: Sequence[Row], measure: str, digits: int = 3) -> str:
    """The mean, and with several rows the smallest and the largest value, as text."""
    values = [row[measure] for row in rows]
    text = f"{mean(rows, measure):.{digits}f}"
    return text if len(rows) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def best_rate(rows: Sequence[Row], measure: str, *, largest: bool = False) -> list[Row]:
    """Of rows that differ in learning rate ("lr") and seed, those of the rate with the best mean over the seeds."""

    def order(own: list[Row]) -> tuple[bool, float]:
        value = mean(own, measure)
        return math.isnan(value), -value if largest else value  # a diverged run is NaN

    return min(groups(rows, "lr").values(), key=order)


def groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values of some columns, in the order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown: the first column left-aligned, the others right-aligned."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
