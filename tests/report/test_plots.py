"""Pictures, measured after matplotlib has laid them out: nothing overlaps, every value is there, labels are plain text."""

from __future__ import annotations

import io
import itertools
import math
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yarn_edge.bench.demo import draw_curves
from yarn_edge.errors import YarnEdgeError
from yarn_edge.report.chart import chart_size, draw_chart
from yarn_edge.report.heat_map import draw_heat_map, heat_map_size
from yarn_edge.report.pictures import DPI, draw, own_style, png
from yarn_edge.report.report import Chart, HeatMap, Line
from yarn_edge.report.ticks import log_ticks, plain_number, token_count, token_ticks

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.image import imread

NAN = math.nan
CONTEXTS = (1024.0, 2048.0, 4096.0, 8192.0)
LINES = (
    Line("YaRN", CONTEXTS, (20.0, 19.0, NAN, 17.5), (0.5, 0.4, 0.3, 0.2)),
    Line("_plain $x^{2$", CONTEXTS, (18.0, 17.0, 40.0, math.inf)),
)
MARKS = ((2048.0, "trained context 2048"), (2500.0, "another mark"), (8192.0, "extended context 8192"))
CHART = Chart("By context", "context (tokens)", "perplexity", LINES, log_x=True, log_y=True, marks=MARKS)


def heat_map(n_rows: int, n_columns: int, **more: Any) -> HeatMap:
    values = tuple(
        tuple(NAN if (r * 7 + c) % 11 == 10 else (r + c) / (n_rows + n_columns) for c in range(n_columns))
        for r in range(n_rows)
    )
    columns, rows = tuple(f"{c + 1}k" for c in range(n_columns)), tuple(f"{r} %" for r in range(n_rows))
    return HeatMap("Found", "context", "depth", more.get("columns", columns), rows, values)


def laid_out(picture: Chart | HeatMap) -> Figure:
    size, function = (chart_size, draw_chart) if isinstance(picture, Chart) else (heat_map_size, draw_heat_map)
    with own_style():
        figure = Figure(figsize=size(picture), dpi=DPI, layout="constrained")  # type: ignore[arg-type]
        function(figure, picture)  # type: ignore[arg-type]
        figure.draw_without_rendering()
    return figure


def pixels(data: bytes) -> Any:
    """(height, width, 3) as whole numbers."""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return np.round(imread(io.BytesIO(data))[..., :3] * 255).astype(int)


def n_pixels_near(data: bytes, color: str) -> int:
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels(data) - wanted).max(axis=-1) < 12).sum())


BLUE, ORANGE = "#0072b2", "#d55e00"
DRAWN: dict[str, Chart | HeatMap] = {
    "curves": CHART,
    "linear": Chart("t", "x", "y", LINES),
    "one point": Chart("t", "context (tokens)", "y", (Line("a", (8192.0,), (12.0,)),)),
    "one point, log": Chart("t", "context (tokens)", "y", (Line("a", (12288.0,), (12.0,), (1.0,)),), True, True),
    "one point at 0": Chart("t", "x", "y", (Line("a", (0.0,), (0.0,)),)),
    "interval below zero": Chart("t", "x", "y", (Line("a", (1.0, 2.0), (1e-9, 0.5), (1e-8, 0.1)),), log_y=True),
    "equal values": Chart("t", "x", "y", (Line("a", (1.0, 2.0), (3.0, 3.0)),), log_y=True),
    "zero on a log axis": Chart("t", "x", "y", (Line("a", (0.0, 1.0, 2.0), (0.0, 3.0, 0.0)),), True, True),
    "many points": Chart("t", "x", "y", (Line("a", tuple(range(3000)), tuple(range(3000))),)),
    "1 x 1": heat_map(1, 1),
    "30 x 30": heat_map(30, 30),
    "30 x 1": heat_map(30, 1),
    "1 x 30": heat_map(1, 30),
    "reversed": HeatMap("t", "x", "y", ("a", "b"), ("c",), ((5.0, 120.0),), low=200.0, high=1.0),
    "one color": HeatMap("t", "x", "y", ("a", "b"), ("c",), ((5.0, math.inf),), low=2.0, high=2.0),
}
EMPTY: dict[str, Chart | HeatMap] = {
    "no lines": Chart("t", "x", "y", (), log_x=True, marks=((1.0, "m"),)),
    "all NaN": Chart("t", "x", "y", (Line("a", (1.0, 2.0), (NAN, NAN), (NAN, NAN)),), True, True),
    "nothing above zero": Chart("t", "x", "y", (Line("a", (1.0,), (0.0,)),), log_y=True),
    "no fields": HeatMap("t", "x", "y", (), (), ()),
    "no columns": HeatMap("t", "x", "y", (), ("a", "b"), ((), ())),
}


@pytest.mark.parametrize("case", DRAWN)
def test_drawn(case: str) -> None:
    data = png([DRAWN[case]])
    seen = pixels(data)
    assert len(np.unique(seen @ (1, 256, 65536))) > 50  # colors
    if isinstance(DRAWN[case], Chart):
        assert n_pixels_near(data, BLUE) > 20


def test_the_same_pictures_are_the_same_bytes() -> None:
    assert png([CHART, DRAWN["1 x 1"]]) == png([CHART, DRAWN["1 x 1"]])


def test_a_single_point_shows_in_the_axes() -> None:
    figure = laid_out(DRAWN["one point"])
    (axes,) = figure.axes
    (line,) = (x for x in axes.get_lines() if len(x.get_xdata()))
    (x, y) = axes.transData.transform((8192, 12.0))
    assert axes.bbox.contains(x, y)
    assert line.get_marker() not in ("", "None", None)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8k"]


@pytest.mark.parametrize("case", EMPTY)
def test_nothing_measured_is_said(case: str) -> None:
    figure = laid_out(EMPTY[case])
    assert "nothing measured" in [text.get_text() for text in figure.axes[0].texts]
    assert png([EMPTY[case]]).startswith(b"\x89PNG")


def test_gaps_and_lonely_points() -> None:
    chart = Chart("t", "x", "y", (Line("a", (1, 2, 3, 4, 5), (1.0, NAN, 2.0, NAN, 3.0), (0.1,) * 5),))
    (axes,) = laid_out(chart).axes
    assert np.isnan(axes.get_lines()[-1].get_ydata()).tolist() == [False, True, False, True, False]
    assert len(axes.containers) == 1  # a bar of error for each point without neighbours
    assert len(axes.containers[0].lines[2][0].get_segments()) == 3


def test_the_band_is_one_standard_error() -> None:
    (axes,) = laid_out(Chart("t", "x", "y", (Line("a", (1, 2), (10.0, 20.0), (1.0, 3.0)),))).axes
    (band,) = axes.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert {(1, 9), (1, 11), (2, 17), (2, 23)} <= corners


def test_lines_differ_without_color() -> None:
    lines = tuple(Line(str(i), (1, 2), (i, i + 1.0)) for i in range(12))
    (axes,) = laid_out(Chart("t", "x", "y", lines)).axes
    styles = {(line.get_marker(), str(line._dash_pattern)) for line in axes.get_lines()}
    assert len(styles) >= 8


def test_every_line_is_in_the_legend_as_it_is_called() -> None:
    (legend,) = laid_out(CHART).legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["YaRN", "_plain $x^{2$"]


def crowded() -> Chart:
    lines = tuple(Line(f"a long name of a model, number {i}" + "x" * 500, CONTEXTS, (i + 1.0,) * 4) for i in range(9))
    marks = tuple((1024.0 * i, f"mark number {i}") for i in range(1, 9))
    return Chart("A long title " * 30, "position in tokens", "y" * 500, lines, marks=marks)


@pytest.mark.parametrize("chart", [CHART, crowded()], ids=["curves", "crowded"])
def test_nothing_overlaps(chart: Chart) -> None:
    figure = laid_out(chart)
    (axes,), (legend,) = figure.axes, figure.legends
    labels = [text for text in axes.texts if text.get_text()]
    assert len(labels) == len(chart.marks)
    boxes = [text.get_window_extent() for text in labels]
    inside = axes.get_window_extent()
    assert inside.height > 2.5 * DPI
    for box in boxes:
        assert box.y0 >= inside.y1 - 1  # above the data
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    title = axes.title.get_window_extent()
    assert all(box.y1 <= title.y0 + 2 for box in boxes)
    assert not legend.get_window_extent().overlaps(inside)
    whole = figure.bbox
    for box in (*boxes, title, legend.get_window_extent(), axes.yaxis.label.get_window_extent()):
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= whole.x1 + 1
        assert box.y1 <= whole.y1 + 1


@pytest.mark.parametrize("case", [name for name, picture in DRAWN.items() if isinstance(picture, Chart)])
def test_ticks_are_plain_and_apart(case: str) -> None:
    (axes,) = laid_out(DRAWN[case]).axes
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        shown = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high and t.label1.get_text()]
        assert 1 <= len(shown) <= 14
        assert not any(c in label.get_text() for label in shown for c in "^${}\\×")
        boxes = [label.get_window_extent() for label in shown]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        assert len({label.get_text() for label in shown}) == len(shown)


def test_token_axes() -> None:
    (axes,) = laid_out(CHART).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "2k", "4k", "8k"]
    assert token_ticks(0, 12288, log=False) == [0, 2048, 4096, 6144, 8192, 10240, 12288]
    assert [token_count(v) for v in (0, 512, 1024, 1536, 10000, 131072, 2**20)] == [
        "0",
        "512",
        "1k",
        "1.5k",
        "10000",
        "128k",
        "1M",
    ]


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (0.1 + 0.2, "0.3"),
        (1000, "1000"),
        (2.5e6, "2.5M"),
        (1e9, "1G"),
        (0.001, "0.001"),
        (1e-10, "1e-10"),
        (-20, "-20"),
    ],
)
def test_plain_numbers(value: float, text: str) -> None:
    assert plain_number(value) == text


@given(st.floats(1e-12, 1e12), st.floats(1.001, 1e15))
def test_log_ticks(low: float, ratio: float) -> None:
    high = low * ratio
    ticks = log_ticks(low, high)
    assert len(ticks) <= 10
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= high for tick in ticks)
    assert len(ticks) >= 4 or ratio < 200


@given(st.integers(1, 2**20), st.floats(1.01, 1e6), st.booleans())
def test_token_ticks(low: int, ratio: float, log: bool) -> None:
    ticks = token_ticks(float(low), low * ratio, log)
    assert len(ticks) <= 10
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert len(ticks) >= 3 or ratio < 8


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (30, 30), (1, 30), (30, 1)], ids=str)
def test_every_value_stands_in_its_field(shape: tuple[int, int]) -> None:
    picture = heat_map(*shape)
    figure = laid_out(picture)
    axes = figure.axes[0]
    found = {(round(t.get_position()[1] - 0.5), round(t.get_position()[0] - 0.5)): t for t in axes.texts}
    wanted = {(r, c): v for r, row in enumerate(picture.values) for c, v in enumerate(row) if not math.isnan(v)}
    assert {place: text.get_text() for place, text in found.items()} == {
        place: f"{value:.{2 if any(v % 1 for v in wanted.values()) else 0}f}" for place, value in wanted.items()
    }
    for (row, column), text in found.items():
        box = text.get_window_extent()
        (x0, y1), (x1, y0) = axes.transData.transform([(column, row), (column + 1, row + 1)])
        assert x0 <= box.x0 < box.x1 <= x1
        assert y0 <= box.y0 + 1
        assert box.y1 - 1 <= y1
        assert text.get_fontsize() >= 7
    whole = figure.bbox
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= whole.x1 + 1
        assert box.y1 <= whole.y1 + 1
    assert bool(figure.legends) == any(math.isnan(v) for row in picture.values for v in row)


def test_values_can_be_read_on_their_colors() -> None:
    """The contrast of WCAG: at least 3 to 1 (large text and graphics) all along the scale."""

    def brightness(color: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3]]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    row = tuple(i / 20 for i in range(21))
    axes = laid_out(HeatMap("t", "x", "y", tuple("abcdefghijklmnopqrstu"), ("r",), (row,))).axes[0]
    (mesh,) = axes.collections
    for text, field in zip(axes.texts, mesh.get_facecolors(), strict=True):
        ink = brightness((0, 0, 0) if text.get_color() == "black" else (1, 1, 1))
        ground = brightness(field)
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 3


def test_the_first_row_is_on_top_and_names_belong() -> None:
    axes = laid_out(heat_map(3, 2)).axes[0]
    labels = {label.get_text(): label.get_window_extent().y0 for label in axes.get_yticklabels()}
    assert labels["0 %"] > labels["1 %"] > labels["2 %"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1k", "2k"]


def test_long_names_below_the_grid_do_not_touch() -> None:
    names = tuple(f"a-model-with-a-long-name-{i}.gguf" for i in range(6))
    figure = laid_out(heat_map(2, 6, columns=names))
    axes = figure.axes[0]
    for label in axes.get_xticklabels():
        assert label.get_rotation() == 45
        assert label.get_window_extent().y0 >= -1
    assert axes.title.get_window_extent().y1 <= figure.bbox.y1 + 1


WRONG: dict[str, Chart | HeatMap] = {
    "y": Chart("t", "x", "y", (Line("a", (1.0, 2.0), (1.0,)),)),
    "error": Chart("t", "x", "y", (Line("a", (1.0, 2.0), (1.0, 2.0), (1.0,)),)),
    "grid": HeatMap("t", "x", "y", ("a", "b"), ("c",), ((1.0,),)),
}


@pytest.mark.parametrize("case", WRONG)
def test_parts_that_do_not_fit_are_a_bug(case: str) -> None:
    with pytest.raises(ValueError):
        png([WRONG[case]])


def test_pictures_stand_below_each_other(tmp_path: Path) -> None:
    one, other = png([CHART]), png([heat_map(3, 4)])
    draw([CHART, heat_map(3, 4)], tmp_path / "p.png")
    sizes = [struct.unpack(">II", data[16:24]) for data in (one, other, (tmp_path / "p.png").read_bytes())]
    assert sizes[2][0] == max(sizes[0][0], sizes[1][0])
    assert sizes[2][1] == pytest.approx(sizes[0][1] + sizes[1][1], abs=2)
    with pytest.raises(YarnEdgeError, match="no picture"):
        draw([], tmp_path / "none.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_the_users_matplotlibrc_changes_nothing() -> None:
    import matplotlib

    usual = png([CHART])
    with matplotlib.rc_context({"lines.linewidth": 9.0, "text.usetex": True, "axes.facecolor": "red"}):
        assert png([CHART]) == usual
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_perplexity_by_position(tmp_path: Path) -> None:
    def buckets(*values: float) -> list[Any]:
        return [SimpleNamespace(start=i * 1024, end=(i + 1) * 1024, perplexity=v) for i, v in enumerate(values)]

    out = tmp_path / "p.png"
    draw_curves({"YaRN": buckets(18, 20, 17), "plain RoPE": buckets(16, 19, 40)}, 2048, out)
    data = out.read_bytes()
    assert n_pixels_near(data, BLUE) > 200
    assert n_pixels_near(data, ORANGE) > 200
    expected = Chart(
        "Perplexity by position",
        "position (tokens)",
        "perplexity",
        (Line("YaRN", (512, 1536, 2560), (18, 20, 17)), Line("plain RoPE", (512, 1536, 2560), (16, 19, 40))),
        log_y=True,
        marks=((2048.0, "trained context 2048"),),
    )
    assert data == png([expected])
