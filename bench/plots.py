"""Pictures of measurements, drawn with matplotlib (the extra `plot`), never shown in a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from yarn_edge.errors import YarnEdgeError

from .perplexity import Bucket


def perplexity_by_position(curves: Mapping[str, Sequence[Bucket]], trained_context: int, path: Path) -> None:
    """Perplexity (log scale) over token position, one line a curve, the trained context marked. Writes `path`."""
    try:
        import matplotlib
    except ImportError as error:
        raise YarnEdgeError("--plot needs matplotlib: pip install 'yarn-edge[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, buckets in curves.items():
        middles = [(b.start + b.end) / 2 for b in buckets]
        axes.plot(middles, [b.perplexity for b in buckets], marker="o", linewidth=2, label=name)
    axes.axvline(trained_context, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        f"trained context {trained_context}",
        (trained_context, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        color="grey",
    )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda _value, _position: ""))
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
