"""Whether a prompt holds a text that its template was given. Templates trim, escape and switch; they may not lose words."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

NEEDLE = "NeedleInTheHaystack"  # a text that is looked for in trial prompts
# Words that set how a model thinks. The templates of Qwen 3, SmolLM 3, Nemotron and GLM 4.5 read them, and may take them out.
_SWITCHES = re.compile(r"/(?:no_?think|think|system_override)")
# How a template may write a text inside other markup: as JSON (`tojson`), or as Python shows a value.
_WRITTEN: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)


class Shown:
    """A prompt in which texts are looked for; quickly, if they are in it in the order in which they are asked for."""

    def __init__(self, prompt: str) -> None:
        self._exact: _Way | None = _Way(prompt, str)
        self._prompt = prompt
        self._ways: list[_Way] = []

    def has(self, text: str) -> bool:
        """Whether every word of `text` is there, in order. White space, upper case and escapes (JSON, HTML) may differ."""
        return all(self._has_piece(piece.strip()) for piece in _SWITCHES.split(text))

    def _has_piece(self, piece: str) -> bool:
        if self._exact is not None:
            if self._exact.finds(piece):
                return True
            self._exact = None  # a template writes all messages alike
            prompts = (_bare(self._prompt), _bare(html.unescape(self._prompt)))
            self._ways = [_Way(prompt, write, _bare) for prompt in prompts for write in _WRITTEN]
        way = next((way for way in self._ways if way.finds(piece)), None)
        if way is not None:
            self._ways.remove(way)
            self._ways.insert(0, way)
        return way is not None


@dataclass(eq=False)
class _Way:
    """A way to write texts, of which only what `kept` keeps is compared. at: behind the last one that was found."""

    prompt: str
    write: Callable[[str], str]
    kept: Callable[[str], str] = str
    at: int = 0

    def finds(self, piece: str) -> bool:
        written = self.kept(self.write(piece))
        found = self.prompt.find(written, self.at)
        if found < 0:
            found = self.prompt.find(written, 0, self.at + len(written))
        if found >= 0:
            self.at = found + len(written)
        return found >= 0


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
