"""Cells as text, the same in a terminal and on a page; and tables as aligned lines.

A number keeps the table's significant digits and is never shown as 1.2e+03. A column shows no more decimals than its values
need. Labels and file names are not trusted: each becomes one printable line of bounded length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from yarn_edge.errors import one_line
from yarn_edge.report.report import Cell, Table

MAX_CELL = 80
MISSING = "-"


def shortened(text: str, limit: int) -> str:
    """`text` as one printable line of at most `limit` characters. The middle is cut, because paths differ at their ends."""
    clean = one_line(text, len(text) + 1)
    if len(clean) <= limit:
        return clean
    head = (limit - 1) // 2
    return f"{clean[:head]}…{clean[len(clean) - (limit - 1 - head) :]}"


def table_text(table: Table) -> str:
    """The title, the columns (numbers aligned right, words left) and the note, each on lines that end with a line break."""
    from rich.cells import cell_len

    header = [shortened(column, MAX_CELL) for column in table.columns]
    columns = [[name, *cells] for name, cells in zip(header, column_texts(table, MAX_CELL), strict=True)]
    widths = [max(map(cell_len, column)) for column in columns]
    to_right = numeric_columns(table)
    lines = [one_line(table.title)] if table.title else []
    for row in zip(*columns, strict=True):
        padded = []
        for text, width, number in zip(row, widths, to_right, strict=True):
            gap = " " * (width - cell_len(text))
            padded.append(gap + text if number else text + gap)
        lines.append("  ".join(padded).rstrip())
    if table.note:
        lines.append(one_line(table.note, 2000))
    return "".join(f"{line}\n" for line in lines)


def numeric_columns(table: Table) -> list[bool]:
    """For each column, whether it holds only numbers (and gaps)."""
    return [not any(isinstance(cell, str) for cell in column) for column in _columns(table)]


def column_texts(table: Table, limit: int) -> list[list[str]]:
    """The cells of each column as texts of at most `limit` characters. Raises ValueError for a row with a wrong number of cells."""
    return [_column_text(column, table.digits, limit) for column in _columns(table)]


def _columns(table: Table) -> list[list[Cell]]:
    if any(len(row) != len(table.columns) for row in table.rows):
        raise ValueError(f"table {table.title!r}: a row has a different number of cells than there are columns")
    return [[row[i] for row in table.rows] for i in range(len(table.columns))]


def _column_text(cells: Sequence[Cell], digits: int, limit: int) -> list[str]:
    """Each number has as many decimals as its significant digits allow, but no more than the longest number of the column needs."""
    fractions = [float(cell) for cell in cells if not isinstance(cell, (str, int, np.integer)) and cell is not None]
    needed = max((_needed_decimals(number, digits) for number in fractions), default=0)
    return [_cell_text(cell, digits, needed, limit) for cell in cells]


def _cell_text(cell: Cell, digits: int, needed: int, limit: int) -> str:
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return shortened(cell, limit)
    if isinstance(cell, (int, np.integer)):
        return str(int(cell))
    number = float(cell)
    if math.isnan(number):
        return MISSING
    if number == 0:
        return "0"
    if _is_plain(number):
        return f"{number:.{min(needed, _allowed_decimals(number, digits))}f}"
    return f"{number:.{digits}g}"


def _is_plain(number: float) -> bool:
    """Readable without an exponent."""
    return 1e-4 <= abs(number) < 1e15


def _allowed_decimals(number: float, digits: int) -> int:
    exponent = int(f"{number:.{digits - 1}e}".partition("e")[2])  # of the rounded number: 9.9999 becomes 10.0
    return max(0, digits - 1 - exponent)


def _needed_decimals(number: float, digits: int) -> int:
    if not _is_plain(number):
        return 0
    return len(f"{number:.{_allowed_decimals(number, digits)}f}".partition(".")[2].rstrip("0"))
