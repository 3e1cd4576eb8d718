"""Curves over one axis: distinct in color, marker and dash, plain numbers on every axis, marks labeled above the data."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.report.report import Bars, Bound, Chart, Line
from yarn_edge.report.tables import shortened
from yarn_edge.report.ticks import set_ticks

# Okabe and Ito's colors, which color-blind people can distinguish. 7 colors, 8 markers and 4 dashes repeat after 56 lines.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
MARKERS = "osD^vPXh"
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1.2, 1.2)))
GREY = "#6b6b6b"
WIDTH_IN, HEIGHT_IN = 8.0, 4.5
MAX_LABEL, MAX_Y_LABEL, MAX_MARK, MAX_TITLE = 60, 44, 48, 160
MANY_POINTS, MARKERS_SHOWN = 60, 24
_POINTS_PER_CHARACTER, _MARK_SIZE, _LEVEL = (
    5.6,
    8.5,
    12,
)  # a character of 10-point text; font size of marks; distance of their levels
_AXES_POINTS = 0.86 * WIDTH_IN * 72

Float64 = npt.NDArray[np.float64]
_BAR_IN, _BARS_IN = 0.34, 1.3  # height of a bar, and of everything around the bars


def chart_size(chart: Chart) -> tuple[float, float]:
    """Width and height in inches. More lines in the legend and more marks make a picture higher."""
    if isinstance(chart, Bars):
        return WIDTH_IN, _BARS_IN + _BAR_IN * max(2, len(chart.lines))
    rows = math.ceil(len(chart.lines) / _legend_columns(chart))
    return WIDTH_IN, HEIGHT_IN + 0.19 * max(0, rows - 1) + _LEVEL / 72 * min(8, max(0, len(chart.marks) - 1))


def draw_chart(figure: Any, chart: Chart) -> None:
    """Draw into a matplotlib figure or subfigure. Raises ValueError if x, y and error differ in length."""
    axes = figure.subplots()
    if isinstance(chart, Bars):
        _draw_bars(axes, chart)
        return
    limits = _log_limits(chart.lines) if chart.log_y else None
    handles = [_draw_line(axes, line, number, chart.log_x, limits) for number, line in enumerate(chart.lines)]
    marks = [(x, label) for x, label in chart.marks if math.isfinite(x) and (x > 0 or not chart.log_x)]
    for x, _label in marks:
        axes.axvline(x, color=GREY, linestyle="--", linewidth=1, zorder=1)
    if any(np.isfinite(handle.get_ydata()).any() for handle in handles):
        _set_scales(axes, chart, limits, [x for x, _label in marks])
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    levels = _draw_marks(axes, marks)
    axes.set_xlabel(shortened(chart.x_label, MAX_LABEL))
    axes.set_ylabel(shortened(chart.y_label, MAX_Y_LABEL))
    axes.set_title(title_lines(chart.title, WIDTH_IN), pad=6 + _LEVEL * levels)
    axes.grid(alpha=0.25)
    labels = [_legend_label(line) for line in chart.lines]
    if any(label.strip() for label in labels):
        figure.legend(
            handles, labels, loc="outside lower center", ncols=_legend_columns(chart), frameon=False, handlelength=3.4
        )


def title_lines(title: str, width_in: float) -> str:
    """A title broken into lines that fit a picture of this width."""
    return "\n".join(textwrap.wrap(shortened(title, MAX_TITLE), max(20, int(width_in * 11))))


def _legend_label(line: Line) -> str:
    """Older versions of matplotlib leave out labels that begin with an underscore, as a file name may."""
    label = shortened(line.label, MAX_LABEL)
    return f" {label}" if label.startswith("_") else label


def _legend_columns(chart: Chart) -> int:
    longest = max((len(_legend_label(line)) for line in chart.lines), default=1)
    fitting = max(1, min(4, int(WIDTH_IN * 72 // (longest * _POINTS_PER_CHARACTER + 60))))
    rows = math.ceil(len(chart.lines) / fitting)
    return math.ceil(len(chart.lines) / max(1, rows)) or 1


def _log_limits(lines: Sequence[Line]) -> tuple[float, float]:
    """Both ends of a logarithmic axis: around every value, and around the part of every interval above zero."""
    ends = [value for line in lines for value in line.y]
    for side in (-1, 1):
        ends += [value + side * error for line in lines for value, error in zip(line.y, line.error, strict=False)]
    places = [end for end in ends if end > 0 and math.isfinite(end)] or [1.0]
    low, high = min(places), max(places)
    margin = 2.0 if low == high else max(1.03, (high / low) ** 0.05)
    return low / margin, high * margin


def _set_scales(axes: Any, chart: Chart, limits: tuple[float, float] | None, marks: Sequence[float]) -> None:
    tokens = "token" in chart.x_label.lower()
    points = (point for line in chart.lines for point in zip(line.x, line.y, strict=True))
    places = {x for x, y in points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x)}.union(marks)
    if chart.log_x:
        axes.set_xscale("log")
    if len(places) == 1:  # matplotlib's own limits around a single place have odd numbers
        (place,) = places
        reach = abs(place) / 2 or 1.0
        axes.set_xlim((place / 2, place * 2) if chart.log_x else (place - reach, place + reach))
    if limits is not None:
        axes.set_yscale("log")
        axes.set_ylim(limits)
    set_ticks(axes.xaxis, axes.get_xlim(), chart.log_x, tokens)
    set_ticks(axes.yaxis, axes.get_ylim(), chart.log_y, tokens=False)
    if len(places) == 1:
        axes.set_xticks(list(places))


def _draw_line(axes: Any, line: Line, number: int, log_x: bool, limits: tuple[float, float] | None) -> Any:
    """Returns the handle for the legend. limits: the ends of a logarithmic y axis, None for a linear one."""
    x, y = np.array(line.x, dtype=np.float64), np.array(line.y, dtype=np.float64)
    error = np.array(line.error, dtype=np.float64) if line.error else np.zeros_like(y)
    if not x.shape == y.shape == error.shape:
        raise ValueError(f"line {line.label!r}: {len(x)} x, {len(y)} y and {len(error)} errors")
    known = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (limits is None))
    x, y = np.where(known, x, np.nan), np.where(known, y, np.nan)
    beside = np.pad(known, 1)
    alone = known & ~beside[:-2] & ~beside[2:]
    color = COLORS[number % len(COLORS)]
    if line.error:
        _draw_error(axes, x, y, np.where(np.isfinite(error), error, 0.0), alone, color, limits)
    if isinstance(line, Bound):
        return axes.plot(x, y, color=GREY, linestyle=DASHES[number % len(DASHES)], linewidth=0.8, zorder=1.5)[0]
    shown = np.arange(len(x)) % max(1, len(x) // MARKERS_SHOWN) == 0 if len(x) > MANY_POINTS else np.ones(len(x), bool)
    (handle,) = axes.plot(
        x,
        y,
        color=color,
        linestyle=DASHES[number % len(DASHES)],
        linewidth=1.6,
        marker=MARKERS[number % len(MARKERS)],
        markersize=5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=(shown | alone).tolist() or None,
    )
    return handle


def _draw_bars(axes: Any, chart: Bars) -> None:
    """Labels on the left, the value at the end of each bar; a bound is a thin line across the bar."""
    for place, line in enumerate(chart.lines):
        value, error = line.y[0], line.error[0] if line.error else 0.0
        text = f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
        axes.barh(place, value, 0.7, color=COLORS[0], xerr=error or None, error_kw={"capsize": 3, "ecolor": GREY})
        axes.annotate(
            text,
            (value + error, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=_MARK_SIZE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            zorder=4,
        )
    bounded = [(place, bound) for place, bound in enumerate(chart.bounds) if bound is not None and math.isfinite(bound)]
    for place, bound in bounded:
        axes.plot([bound, bound], [place - 0.45, place + 0.45], color=GREY, linewidth=1.2, linestyle=DASHES[1])
    places = range(len(chart.lines))
    axes.set_yticks(list(places), [shortened(line.label, MAX_Y_LABEL) for line in chart.lines])
    axes.set_ylim(max(2, len(chart.lines)) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(shortened(chart.y_label, MAX_LABEL) + (" (dashed: the ceiling)" if bounded else ""))
    axes.set_title(title_lines(chart.title, WIDTH_IN))
    axes.grid(axis="x", alpha=0.25)


def _draw_error(
    axes: Any,
    x: Float64,
    y: Float64,
    error: Float64,
    alone: npt.NDArray[np.bool_],
    color: str,
    limits: tuple[float, float] | None,
) -> None:
    low, high = y - error if limits is None else np.maximum(y - error, limits[0]), y + error
    axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    if alone.any():  # a band needs two neighbours
        sides = np.stack([y - low, high - y])[:, alone]
        axes.errorbar(x[alone], y[alone], sides, fmt="none", ecolor=color, elinewidth=1, capsize=3, alpha=0.7)


def _draw_marks(axes: Any, marks: Sequence[tuple[float, str]]) -> int:
    """Label each mark above the axes, like a flag on its pole. Flags that would overlap are put higher. Returns the number of levels."""
    taken: list[list[tuple[float, float]]] = []
    for x, label in sorted(marks, reverse=True):
        text = shortened(label, MAX_MARK)
        width = len(text) * _POINTS_PER_CHARACTER * _MARK_SIZE / 10 + 6
        pole = float(axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))[0])
        start = pole * _AXES_POINTS
        to_left = start + width > _AXES_POINTS * 1.02
        span = (start - width, start) if to_left else (start, start + width)
        level = next(
            (i for i, spans in enumerate(taken) if all(span[1] < a or b < span[0] for a, b in spans)), len(taken)
        )
        if level == len(taken):
            taken.append([])
        taken[level].append(span)
        foot = _LEVEL * level
        axes.annotate(
            text,
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if to_left else 3, foot + 2),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="bottom",
            color=GREY,
            fontsize=_MARK_SIZE,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )
        axes.annotate(
            "",
            (x, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, foot + _LEVEL),
            textcoords="offset points",
            arrowprops={
                "arrowstyle": "-",
                "color": GREY,
                "linestyle": "--",
                "linewidth": 1,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
    return len(taken)
