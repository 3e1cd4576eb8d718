"""Names of control tokens inside what people, tools and documents say: marked before a template runs, so that they stay text after it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from yarn_edge.runtime.token_names import TokenNames

_LITERAL, _END = "\ue0f0", "\ue0f1"  # private use
_MARKS = str.maketrans("", "", _LITERAL + _END)
_MARKED = re.compile(f"{_LITERAL}([^{_END}]*){_END}")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield key
            yield from texts_in(inside)
    elif isinstance(value, (list, tuple)):
        for inside in value:
            yield from texts_in(inside)


def marked(value: Any, names: TokenNames) -> Any:
    """The same JSON value, with marks around the names in all its texts."""
    if isinstance(value, str):
        parts = names.split(value.translate(_MARKS))
        return "".join(f"{_LITERAL}{part}{_END}" if is_name else part for part, is_name in parts)
    if isinstance(value, Mapping):
        return {marked(key, names): marked(inside, names) for key, inside in value.items()}
    return [marked(inside, names) for inside in value] if isinstance(value, (list, tuple)) else value


def literal_parts(rendered: str) -> Iterator[tuple[str, bool]]:
    """A rendered text in parts, without marks, each with whether it must stay text."""
    for i, part in enumerate(_MARKED.split(rendered.replace(_LITERAL + _END, ""))):
        yield part.translate(_MARKS), bool(i % 2)


def without_marked(text: str) -> str:
    """Without the names that are marked, because a template may take them out."""
    return _MARKED.sub("", text)
