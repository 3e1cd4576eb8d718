"""Texts in two parts: what calibrates, and an end of each that is kept for measuring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.convert.moments.collect import LEAST_WINDOW
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.model import Model
from yarn_edge.writer import write_file

from ..quality.text_settings import TextSettings


@dataclass(frozen=True)
class HeldOut:
    """others: the texts without what was held out; ends: that. n_tokens: of the longest end."""

    others: Mapping[str, str]
    ends: Sequence[str]
    n_tokens: int

    def written(self, folder: Path) -> TextSettings:
        """The ends as files in `folder`, to be read in one window each."""
        folder.mkdir(exist_ok=True)
        for number, text in enumerate(self.ends):
            write_file(folder / f"{number}.txt", text, force=True)
        return TextSettings(str(folder), "curve", self.n_tokens, chunks=1)


def held_out(model: Model, texts: Mapping[str, str], n_ctx: int) -> HeldOut:
    """The last `n_ctx` tokens of each text, at most half of it. Raises YarnEdgeError for a text that is too short."""
    others, ends, longest = {}, [], 0
    for name, text in texts.items():
        n_tokens = len(model.tokenize(text, add_special=False, parse_special=False))
        n_held = min(n_ctx, n_tokens // 2)
        if n_held < LEAST_WINDOW:
            raise YarnEdgeError(
                f"{name}: has {n_tokens} tokens: {2 * LEAST_WINDOW} are needed, half to calibrate and half to measure"
            )
        if n_held < n_ctx:
            note(f"note: {name}: has {n_tokens} tokens: what is measured ends at {n_held} of {n_ctx} tokens of context")
        cut = len(text) - round(len(text) * n_held / n_tokens)
        others[name] = text[:cut]
        ends.append(text[cut:])
        longest = max(longest, n_held)
    return HeldOut(others, ends, longest)
