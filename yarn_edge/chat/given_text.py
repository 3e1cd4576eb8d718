"""Whether a prompt holds a text that its template was given. Templates trim, escape and switch; they may not lose words."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable

# Words that set how a model thinks. The templates of Qwen 3, SmolLM 3, Nemotron and GLM 4.5 read them, and may take them out.
_SWITCHES = re.compile(r"/(?:no_?think|think|system_override)")
# How a template may write a text inside other markup: as JSON (`tojson`), or as Python shows a value.
_WRITTEN: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)


def shows(prompt: str, text: str) -> bool:
    """Whether every word of `text` is in `prompt`, in order. White space, upper case and escapes (JSON, HTML) may differ."""
    pieces = [piece.strip() for piece in _SWITCHES.split(text)]
    if all(piece in prompt for piece in pieces):
        return True
    prompts = tuple(_bare(shown) for shown in (prompt, html.unescape(prompt)))
    return all(any(_bare(write(piece)) in shown for write in _WRITTEN for shown in prompts) for piece in pieces)


def _bare(text: str) -> str:
    return "".join(text.split()).casefold()
