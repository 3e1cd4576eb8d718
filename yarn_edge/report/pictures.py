"""Pictures of measurements: charts and heat maps as one image, drawn with matplotlib (the extra `plot`), never in a window.

matplotlib is loaded when something is drawn, and with its own defaults: a user's matplotlibrc changes no picture.
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
# A formula in a label is text.
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
    """Raise the YarnEdgeError that says how to install matplotlib, if it cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise YarnEdgeError(f"{flag} needs matplotlib: pip install 'yarn-edge[plot]'") from error


def png(pictures: Sequence[Picture]) -> bytes:
    """The pictures, one below the other, as one PNG; the same pictures are the same bytes.

    Raises YarnEdgeError without matplotlib and without pictures, ValueError for a picture whose parts do not fit together.
    """
    need_matplotlib()
    if not pictures:
        raise YarnEdgeError("there is no picture to draw in this measurement")
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
    """Draw the pictures, one below the other, into the PNG file `path`: whole or not at all.

    Without `force` a file that is there already is left alone. Raises what `png` raises, and YarnEdgeError where `path`
    cannot be written.
    """
    write_file(path, png(pictures), force)


@contextmanager
def own_style() -> Iterator[None]:
    """matplotlib's own defaults and ours, whatever the user's matplotlibrc says; as it was afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield
