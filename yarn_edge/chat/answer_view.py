"""Shows an answer in a terminal as it is generated, with the Markdown that can be styled without waiting for the end of the text.

Nothing is drawn twice and the cursor is not moved: what was shown stays, and can be scrolled and copied. Text is held back only while
it could be the beginning of a marker (asterisks, backticks, the number signs of a heading).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from yarn_edge.foreign_text import harmless

HEADING, BOLD, CODE, FENCE, REASONING = "bold", "bold", "cyan", "dim cyan", "dim italic"
_INLINE = re.compile(r"\*\*|`")
_LINE_START = re.compile(r"(#{1,6} |`{3,}|~{3,})")
_MAY_START = re.compile(r"(#{0,6}|`{0,3}|~{0,3})\Z")


class AnswerView:
    """Styles a stream of text. show: called with a piece of text and the name of a rich style ("" for none)."""

    def __init__(self, show: Callable[[str, str], None]) -> None:
        self._show = show
        self._held = ""
        self._at_line_start = True
        self._fence = ""  # the opening fence of the code block that the text is in
        self._line_style = ""
        self._bold = self._code = False
        self.begun = False  # whether anything was given to show

    def reasoning(self, text: str) -> None:
        """Show a piece of reasoning."""
        self._show(harmless(text), REASONING)
        self.begun = True

    def answer(self, text: str) -> None:
        """Show a piece of the answer."""
        self._held += harmless(text)
        self.begun = True
        while self._held and self._step():
            pass

    def end(self) -> None:
        """Show what was held back: the text has ended."""
        if self._held:
            self._put(self._held)
            self._held = ""

    def _step(self) -> bool:
        """Show the next part of the held text; False if more text is needed first."""
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
        """Show a line, or the part of it that is there; returns an end that could be half a marker."""
        at = 0
        for match in _INLINE.finditer(line):
            marker = match[0]
            if marker == "**" and self._code:
                continue
            self._put(line[at : match.start()])
            at = match.end()
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
