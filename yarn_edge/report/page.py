"""A report as one self-contained HTML page: no requests, no scripts, the pictures embedded.

Every text from outside is escaped and one printable line (the command keeps its line breaks). The page's own security policy
allows only inline styles and data: pictures.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from yarn_edge.errors import one_line
from yarn_edge.report.pictures import DPI, png
from yarn_edge.report.report import Chart, Picture, Report, Table
from yarn_edge.report.tables import column_texts, numeric_columns, shortened

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_CELL, MAX_TEXT, MAX_COMMAND = 300, 2000, 20_000
_CSS_DPI = 96


def page(report: Report, environment: Mapping[str, str], command: str) -> str:
    """The whole page. Raises YarnEdgeError without matplotlib."""
    from jinja2 import Environment, StrictUndefined

    engine = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return engine.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=shortened(report.title, MAX_CELL),
        summary=[one_line(sentence, MAX_TEXT) for sentence in report.summary],
        pictures=[_picture(picture) for picture in report.pictures],
        tables=[_table(table) for table in report.tables],
        environment=[(shortened(name, 60), one_line(value, MAX_TEXT)) for name, value in environment.items()],
        command="\n".join(one_line(line, MAX_COMMAND) for line in command[:MAX_COMMAND].split("\n")),
    )


def _picture(picture: Picture) -> dict[str, Any]:
    drawn = png([picture])
    width, height = struct.unpack(">II", drawn[16:24])  # of the IHDR chunk
    return {
        "base64": base64.b64encode(drawn).decode("ascii"),
        "width": round(width * _CSS_DPI / DPI),
        "height": round(height * _CSS_DPI / DPI),
        "alt": _in_words(picture),
    }


def _in_words(picture: Picture) -> str:
    """What the picture shows, for people who cannot see it; the numbers are in the tables."""
    x, y = shortened(picture.x_label, 80), shortened(picture.y_label, 80)
    if isinstance(picture, Chart):
        lines = "; ".join(f"{shortened(line.label, 80)}{_range(line.y)}" for line in picture.lines)
        text = f"{shortened(picture.title, MAX_CELL)}: {y} over {x}. {lines}"
    else:
        size = f"{len(picture.rows)} rows ({y}), {len(picture.columns)} columns ({x})"
        values = _range(value for row in picture.values for value in row)
        text = f"{shortened(picture.title, MAX_CELL)}: heat map of {size}{values}"
    return one_line(text, MAX_TEXT)


def _range(values: Iterable[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f" from {min(finite):.4g} to {max(finite):.4g}" if finite else " (nothing measured)"


def _table(table: Table) -> dict[str, Any]:
    columns = column_texts(table, MAX_CELL)
    return {
        "title": shortened(table.title, MAX_CELL),
        "columns": [
            {"name": shortened(name, MAX_CELL), "number": number}
            for name, number in zip(table.columns, numeric_columns(table), strict=True)
        ],
        "rows": list(zip(*columns, strict=True)),
        "note": one_line(table.note, MAX_TEXT),
    }
