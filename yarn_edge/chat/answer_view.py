"""An answer in a terminal as it comes: the little Markdown that can be styled without waiting for the end of the text.

Nothing is drawn twice and no cursor is moved: what was shown stays, can be scrolled and copied. Of a marker (asterisks, backticks,
the sharps of a heading) only as much is held back as does not tell yet what it is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

HEADING, BOLD, CODE, FENCE, REASONING = "bold", "bold", "cyan", "dim cyan", "dim italic"
_INLINE = re.compile(r"\*\*|`")
_LINE_START = re.compile(r"(#{1,6} |`{3,}|~{3,})")
_MAY_START = re.compile(r"(#{0,6}|`{0,3}|~{0,3})\Z")


def without_controls(text: str) -> str:
    """For a terminal: what a model writes must not move the cursor, set the title or ring the bell."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class AnswerView:
    """Styles a stream of text. show: is called with a piece and the name of a rich style ("" for none)."""

    def __init__(self, show: Callable[[str, str], None]) -> None:
        self._show = show
        self._held = ""
        self._at_line_start = True
        self._fence = ""  # the fence that the text is behind
        self._line_style = ""
        self._bold = self._code = False
        self._any = False

    def reasoning(self, text: str) -> None:
        """A piece of what the model thinks."""
        self._show(without_controls(text), REASONING)
        self._any = True

    def answer(self, text: str) -> None:
        """A piece of what it says."""
        self._held += without_controls(text)
        while self._held and self._step():
            pass

    def end(self) -> None:
        """Nothing more comes."""
        if self._held:
            self._put(self._held)
            self._held = ""

    def _step(self) -> bool:
        """Show the next part of what is held; False if it must wait for more."""
        if self._at_line_start:
            indent = len(self._held) - len(self._held.lstrip(" "))
            rest = self._held[indent:]
            if "\n" not in rest and (not rest or _MAY_START.match(rest)):
                return False
            marker = _LINE_START.match(rest)
            if marker is not None and self._is_fence(marker[1]):
                line, newline, after = self._held.partition("\n")
                if not newline:
                    return False
                self._fence = "" if self._fence else marker[1]
                self._show(f"{line}\n", FENCE)
                self._held = after
                return True
            self._line_style = HEADING if marker is not None and marker[1].startswith("#") and not self._fence else ""
            self._at_line_start = False
        line, newline, after = self._held.partition("\n")
        if self._fence:
            self._show(line + newline, CODE)
            self._held = after
        else:
            waits = self._inline(line, bool(newline))
            if newline:
                self._show("\n", "")
            self._held = after if newline else waits
        self._at_line_start = bool(newline)
        if newline:
            self._line_style, self._bold, self._code = "", False, False
        return bool(newline) and bool(self._held)

    def _is_fence(self, marker: str) -> bool:
        return marker[0] in "`~" and (
            not self._fence or (marker[0] == self._fence[0] and len(marker) >= len(self._fence))
        )

    def _inline(self, line: str, whole: bool) -> str:
        """Show a line, or what there is of it; returns an end that may be half a marker."""
        at = 0
        for found in _INLINE.finditer(line):
            marker = found[0]
            if marker == "**" and self._code:
                continue
            self._put(line[at : found.start()])
            at = found.end()
            if marker == "`":
                self._code = not self._code
            else:
                self._bold = not self._bold
        rest = line[at:]
        if not whole and rest.endswith("*") and not self._code:
            self._put(rest[:-1])
            return "*"
        self._put(rest)
        return ""

    def _put(self, text: str) -> None:
        if text:
            style = CODE if self._code else BOLD if self._bold else self._line_style
            self._show(text, style)
