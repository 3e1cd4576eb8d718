"""A grid of values as colors, each value written in its field in a color that is readable on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.report.chart import GREY, MAX_LABEL, MAX_Y_LABEL, title_lines
from yarn_edge.report.report import HeatMap
from yarn_edge.report.tables import shortened
from yarn_edge.report.ticks import plain_number

MAX_COLUMN, MAX_ROW = 20, 28
_LABEL_SIZE = 9
_CHARACTER_IN = 0.62 / 72  # width of a character for each point of font size
_COLORS = "viridis"


def heat_map_size(heat_map: HeatMap) -> tuple[float, float]:
    """Width and height in inches. No field is smaller than the text in it."""
    width, height = _grid_size(heat_map)
    left = max((len(shortened(label, MAX_ROW)) for label in heat_map.rows), default=0) * _LABEL_SIZE * _CHARACTER_IN
    below = _longest_column(heat_map) * 0.71 + 0.2 if _turned(heat_map) else 0.15
    missing = any(math.isnan(value) for row in heat_map.values for value in row)
    whole = max(3.6, width + left + 1.6)
    above = 0.18 * title_lines(heat_map.title, whole).count("\n")
    return whole, max(1.4, height + below + above + 0.85 + 0.25 * missing)


def draw_heat_map(figure: Any, heat_map: HeatMap) -> None:
    """Draw into a matplotlib figure or subfigure. Raises ValueError if the values are not rows x columns."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    shape = len(heat_map.rows), len(heat_map.columns)
    values = np.array(heat_map.values, dtype=np.float64).reshape(shape)
    axes = figure.subplots()
    axes.set_title(title_lines(heat_map.title, heat_map_size(heat_map)[0]))
    axes.set_xlabel(shortened(heat_map.x_label, MAX_LABEL))
    axes.set_ylabel(shortened(heat_map.y_label, MAX_Y_LABEL))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=_LABEL_SIZE)
    if not values.size:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
        return
    low, high = sorted((heat_map.low, heat_map.high))
    colors = colormaps[_COLORS if heat_map.low <= heat_map.high else f"{_COLORS}_r"]
    scale = Normalize(low, high if high > low else low + 1, clip=True)
    width, height = _grid_size(heat_map)
    axes.set_box_aspect(height / width)
    axes.patch.set(facecolor="#e8e8e8", edgecolor="#9a9a9a", hatch="////")  # visible where nothing was measured
    drawn = axes.pcolormesh(np.ma.masked_invalid(values), cmap=colors, norm=scale, edgecolors="white", linewidth=0.8)
    axes.set(xlim=(0, shape[1]), ylim=(shape[0], 0))
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if _turned(heat_map) else {}
    axes.set_xticks(np.arange(shape[1]) + 0.5, [shortened(label, MAX_COLUMN) for label in heat_map.columns], **turned)
    axes.set_yticks(np.arange(shape[0]) + 0.5, [shortened(label, MAX_ROW) for label in heat_map.rows])
    texts, size = _texts(values), _font_size(shape[1])
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            dark = _luminance(colors(float(scale(value)))) < 0.45
            axes.text(
                column + 0.5,
                row + 0.5,
                texts[row][column],
                ha="center",
                va="center",
                fontsize=size,
                color="white" if dark else "black",
            )
    bar = figure.colorbar(drawn, cax=axes.inset_axes((1 + 0.12 / width, 0, min(0.1, 0.14 / width), 1)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)
    bar.formatter = lambda value, _position: plain_number(value)
    if np.isnan(values).any():
        patch = Patch(facecolor="#e8e8e8", edgecolor="#9a9a9a", hatch="////", linewidth=0)
        figure.legend([patch], ["not measured"], loc="outside lower right", frameon=False, fontsize=8)


def _grid_size(heat_map: HeatMap) -> tuple[float, float]:
    """Width and height of all fields together, in inches."""
    n_columns, n_rows = max(1, len(heat_map.columns)), max(1, len(heat_map.rows))
    texts = _texts(np.array(heat_map.values, dtype=np.float64))
    longest = max((len(text) for row in texts for text in row), default=1)
    needed = longest * _font_size(n_columns) * _CHARACTER_IN + 0.12
    return n_columns * max(needed, min(0.9, 6 / n_columns)), n_rows * max(0.26, min(0.45, 4 / n_rows))


def _font_size(n_columns: int) -> int:
    return 9 if n_columns <= 12 else 8 if n_columns <= 20 else 7


def _longest_column(heat_map: HeatMap) -> float:
    """Length in inches of the longest label below the grid."""
    longest = max((len(shortened(label, MAX_COLUMN)) for label in heat_map.columns), default=0)
    return longest * _LABEL_SIZE * _CHARACTER_IN


def _turned(heat_map: HeatMap) -> bool:
    """Whether the labels below the grid are too long to fit side by side."""
    return _longest_column(heat_map) + 0.06 > _grid_size(heat_map)[0] / max(1, len(heat_map.columns))


def _texts(values: npt.NDArray[np.float64]) -> list[list[str]]:
    """All with the same number of decimals: none if all are whole or one is 100 or more, one up to 100, two up to 10."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0))
    decimals = 0 if (finite == np.round(finite)).all() or largest >= 100 else 1 if largest >= 10 else 2
    return [["" if math.isnan(value) else f"{value:.{decimals}f}" for value in row] for row in np.atleast_2d(values)]


def _luminance(color: tuple[float, ...]) -> float:
    """How bright it looks, 0 to 1 (ITU-R BT.709 weights)."""
    return float(np.dot(color[:3], (0.2126, 0.7152, 0.0722)))
