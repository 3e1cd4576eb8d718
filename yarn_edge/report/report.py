"""One measurement, described once: tables, charts and heat maps as values. `deliver` writes them."""

from __future__ import annotations

from dataclasses import dataclass

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns. Numbers are shown with `digits` significant digits, None as a dash. note: below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    digits: int = 5


@dataclass(frozen=True)
class Line:
    """One curve: points (x, y) and, if known, a standard error for each y. NaN is a gap."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    error: tuple[float, ...] = ()


@dataclass(frozen=True)
class Chart:
    """Curves over one axis. marks: vertical lines, as (x, label)."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    marks: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Bars(Chart):
    """A bar for each line's first y with its error, top to bottom. bounds: a thin mark across each bar, None for none.

    y_label names the values; there is no other axis.
    """

    bounds: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Bound(Line):
    """A limit of other lines: thin, without markers."""


@dataclass(frozen=True)
class HeatMap:
    """values[row][column], colored between low and high; NaN for what was not measured. Each field shows its value."""

    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    low: float = 0.0
    high: float = 1.0


Picture = Chart | HeatMap


@dataclass(frozen=True)
class Report:
    """One measurement. summary: sentences, first on the page and last in the terminal. `deliver` adds environment and command."""

    title: str
    summary: tuple[str, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...] = ()
