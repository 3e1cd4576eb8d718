"""Pictures of measurements: charts and heat maps as one image, drawn with matplotlib (the extra `plot`), never in a window.

matplotlib is loaded when something is drawn, and with its own defaults: the user's matplotlibrc does not change any picture.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.report.report import Chart, HeatMap, Picture
from yarn_edge.writer import write_file

DPI = 130
# parse_math: a formula in a label is text.
_STYLE = {
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": False,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_METADATA = {
    "png": {"Software": None},
    "svg": {"Creator": None, "Date": None},
    "pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}


def need_matplotlib(flag: str = "--plot") -> None:
    """If matplotlib cannot be imported, raise the YarnEdgeError that says how to install it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise YarnEdgeError(f"{flag} needs matplotlib: pip install 'yarn-edge[plot]'") from error


def png(pictures: Sequence[Picture]) -> bytes:
    """The pictures, one below the other, as one PNG. The same pictures give the same bytes.

    Raises YarnEdgeError without matplotlib or without pictures, ValueError for a picture whose parts do not fit together.
    """
    need_matplotlib()
    if not pictures:
        raise YarnEdgeError("this measurement has no picture to draw")
    from matplotlib.figure import Figure

    from yarn_edge.report.chart import chart_size, draw_chart
    from yarn_edge.report.heat_map import draw_heat_map, heat_map_size

    with own_style():
        sizes = [chart_size(p) if isinstance(p, Chart) else heat_map_size(p) for p in pictures]
        heights = [height for _width, height in sizes]
        figure = Figure(figsize=(max(width for width, _height in sizes), sum(heights)), layout="constrained")
        parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, picture in zip(parts, pictures, strict=True):
            if isinstance(picture, HeatMap):
                draw_heat_map(part, picture)
            else:
                draw_chart(part, picture)
        return rendered(figure)


def rendered(figure: Any, kind: str = "png") -> bytes:
    """A matplotlib figure as a file of this kind, without the date and the version that matplotlib would write into it."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, dpi=DPI, metadata=_METADATA.get(kind))
    return drawn.getvalue()


def draw(pictures: Sequence[Picture], path: Path, force: bool = True) -> None:
    """Draw the pictures, one below the other, into the PNG file `path`, whole or not at all.

    Without `force` an existing file is left alone. Raises what `png` raises, and YarnEdgeError if `path` cannot be written.
    """
    write_file(path, png(pictures), force)


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's defaults and our style while open, whatever the user's matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # Characters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield
