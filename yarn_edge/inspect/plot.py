"""The picture of a scaling: wavelengths by pair before and after, the ramp, the original context, and the wrong pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RAMPED_METHODS, SAME_RELATIVE, RopeScaling
from yarn_edge.report.pictures import need_matplotlib, own_style, rendered
from yarn_edge.report.ticks import set_ticks
from yarn_edge.writer import write_file

BLUE, GREY, ORANGE, RED = "#1f5fa8", "#888888", "#c77700", "#c02020"
KINDS = ("png", "svg", "pdf", "jpg")


def plot_scaling(path: Path, title: str, wanted: RopeScaling, runs: RopeScaling | None) -> int | None:
    """Draw `wanted` to `path` (.png, .svg, .pdf or .jpg). runs: what llama.cpp computes, None if that is unknown.

    Returns the number of pairs that llama.cpp would compute wrongly, None if that is unknown. Raises YarnEdgeError without
    matplotlib, for an unknown suffix, and if `path` cannot be written; then no file is left.
    """
    need_matplotlib()
    from matplotlib.figure import Figure

    kind = path.suffix[1:].lower()
    if kind not in KINDS:
        raise YarnEdgeError(f"{path}: a picture's name ends with one of {', '.join(f'.{k}' for k in KINDS)}")
    wrong = wrong_pairs(wanted, runs)
    with own_style():
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        _draw(figure, title, wanted, runs, wrong)
        picture = rendered(figure, kind)
    write_file(path, picture, force=True)
    return None if wrong is None else int(wrong.sum())


def wrong_pairs(wanted: RopeScaling, runs: RopeScaling | None) -> npt.NDArray[np.bool_] | None:
    """Which pairs of `wanted` run at another frequency, shape (D/2,); None if it is unknown what runs."""
    if runs is None:
        return None
    if runs.dim != wanted.dim:
        return np.ones(wanted.dim // 2, bool)
    return np.asarray(np.abs(rope.inv_freq(wanted) / rope.inv_freq(runs) - 1) > SAME_RELATIVE)


def _draw(
    figure: Any, title: str, wanted: RopeScaling, runs: RopeScaling | None, wrong: npt.NDArray[np.bool_] | None
) -> None:
    pairs = np.arange(wanted.dim // 2)
    plain, scaled = rope.rope_inv_freq(wanted.dim, wanted.rope_theta), rope.inv_freq(wanted)
    axes = figure.subplots()
    style: dict[str, Any] = {"marker": "o", "ms": 3}
    axes.semilogy(pairs, rope.wavelengths(plain), lw=1, color=GREY, label="plain RoPE", **style)
    if not np.array_equal(plain, scaled):
        label = "frequency factors" if wanted.method == "none" else f"{wanted.method}, factor {wanted.factor:g}"
        axes.semilogy(pairs, rope.wavelengths(scaled), lw=1.5, color=BLUE, label=label, **style)
    if runs is not None and wrong is not None and wrong.any():
        _draw_wrong(axes, pairs, scaled, runs, wrong)
    axes.axhline(
        wanted.original_context, color=ORANGE, lw=1, ls="--", label=f"original context {wanted.original_context}"
    )
    if wanted.method in RAMPED_METHODS:
        other = axes.twinx()
        other.fill_between(
            pairs,
            1 - rope.extrapolation_mix(wanted),
            step="mid",
            color=BLUE,
            alpha=0.1,
            lw=0,
            label="ramp: share divided by the factor (right axis)",
        )
        other.set_ylim(0, 1.02)
        other.set_ylabel("share divided by the factor")
    attention = f"attention factor {wanted.attention_factor:.4f}"
    if runs is not None and abs(runs.attention_factor / wanted.attention_factor - 1) > SAME_RELATIVE:
        attention += f", plain llama.cpp runs {runs.attention_factor:.4f}"
    axes.set_xlabel("pair of dimensions")
    axes.set_ylabel("wavelength (tokens)")
    axes.set_title(f"{one_line(title, 90)}\n{attention}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.25)
    axes.xaxis.get_major_locator().set_params(integer=True)
    set_ticks(axes.yaxis, axes.get_ylim(), log=True, tokens=True)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.set_zorder(2)  # the lines in front of the shade
    axes.patch.set_visible(False)


def _draw_wrong(
    axes: Any, pairs: npt.NDArray[np.int64], scaled: rope.Float64, runs: RopeScaling, wrong: npt.NDArray[np.bool_]
) -> None:
    theirs = rope.inv_freq(runs)
    if theirs.shape != scaled.shape:
        axes.plot(
            [], [], "x", color=RED, label=f"plain llama.cpp rotates {2 * theirs.size} dimensions, not {2 * scaled.size}"
        )
        return
    worst = float(np.abs(theirs / scaled - 1).max())
    axes.semilogy(
        pairs[wrong],
        rope.wavelengths(theirs)[wrong],
        "x",
        ms=7,
        mew=2,
        color=RED,
        label=f"plain llama.cpp: {int(wrong.sum())} pairs wrong, frequencies up to {worst:.1%} off",
    )
