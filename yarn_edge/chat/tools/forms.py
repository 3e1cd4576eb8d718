"""The form of calls that a chat template asks for, with its grammar and its parser."""

from __future__ import annotations

import re

from yarn_edge.chat.tools.call_grammar import call_constraint, in_final_channel
from yarn_edge.chat.tools.dialects import DIALECTS, GENERIC_DIALECT, CallDialect, Choice, Tools
from yarn_edge.chat.tools.parser import ToolParser
from yarn_edge.engine.constraint import Constraint


class ToolForm(CallDialect):
    """A row of the table, and what is made of it."""

    def constraint(
        self, tools: Tools, choice: Choice = "auto", *, opened: str | None = None, several: bool = True
    ) -> Constraint | None:
        """The grammar of calls: after a trigger (auto), or of the whole answer (required, or a function by name).

        opened: the closing tag of a block that the prompt left open, such as </think>; several: whether more than one call may be
        made. None if no call is asked for, or there are no tools. Raises YarnEdgeError that names the tool and the field.
        """
        return call_constraint(self, tools, choice, opened, several and self.several)

    def framed(self, answer: Constraint) -> Constraint:
        """The constraint of a whole answer, such as a schema's, where the form has channels: of the final one, after the analysis."""
        return in_final_channel(self, answer) if self.channels else answer

    def parser(self, tools: Tools) -> ToolParser:
        """Reads an answer from a stream of text. Only functions of `tools` can be called: other text stays text."""
        return ToolParser(self, tools)


FORMS = tuple(ToolForm(**vars(dialect)) for dialect in DIALECTS)
GENERIC = ToolForm(**vars(GENERIC_DIALECT))


def tool_form(template: str | None) -> ToolForm:
    """The form that a chat template asks for. The generic one if it knows no tools, or calls that are not in the table."""
    text = template or ""
    if not re.search(r"\btools\b", text):
        return GENERIC
    return next((form for form in FORMS if all(re.search(mark, text) for mark in form.marks)), GENERIC)
