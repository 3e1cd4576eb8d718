"""An answer's text, as it comes, told apart into text and calls. However the text is cut into pieces, the events say the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from yarn_edge.chat.reasoning import undecided
from yarn_edge.chat.tools.call_grammar import function_of, tool_names
from yarn_edge.chat.tools.channels import Channels
from yarn_edge.chat.tools.dialects import CallDialect, Tools
from yarn_edge.chat.tools.readers import CallReader, JsonCall, NamedCall, TagCall
from yarn_edge.chat.tools.said import CallArguments, CallBegun, CallEnded, ReasoningSaid, Said, TextSaid, new_call_id

_SPACE = " \t\r\n"


class ToolParser:
    """Push style: `feed` what the model said, without its reasoning unless the form has channels, then `end`.

    Text that may begin a call is held back until that is decided; what turns out to be none is text. White space before and between
    calls is dropped. A call that breaks off after its name keeps what was said of its arguments.
    """

    def __init__(self, form: CallDialect, tools: Tools) -> None:
        self._form, self._names = form, tool_names(tools)
        self._properties = {str(function_of(tool)["name"]): _properties(tool) for tool in tools}
        self._channels = Channels(self._names) if form.channels else None
        self._starts = form.starts if tools else ()
        self._held, self._index = "", 0
        self._at_start, self._after = True, False  # nothing but white space was said; a call was, and nothing since
        self._reader: CallReader | None = None
        self._raw, self._start = "", ""  # of the call that is read, with the white space before it

    def feed(self, text: str) -> list[Said]:
        """What can be said after this piece."""
        if self._channels is not None:
            return _joined([self._in_channel(kind, part) for kind, part in self._channels.feed(text)])
        self._held += text
        said: list[Said] = []
        while self._in_call(said) if self._reader is not None else self._in_text(said):
            pass
        return _joined(said)

    def end(self) -> list[Said]:
        """What is left at the answer's end."""
        if self._channels is not None:
            return _joined([self._in_channel(kind, part) for kind, part in self._channels.end()])
        said: list[Said] = []
        if (reader := self._reader) is not None:
            if reader.named:
                said.append(CallEnded(self._index))
            else:
                self._held = self._raw + self._held
            self._reader = None
        elif self._after and any(closer.startswith(self._held) for closer in self._form.closers):
            self._held = ""  # a closing tag that was cut
        self._say(said, self._held)
        self._held = ""
        return _joined(said)

    def _in_channel(self, kind: str, text: str) -> Said:
        match kind:
            case "call":
                return CallBegun(self._index, new_call_id(), text)
            case "arguments":
                return CallArguments(self._index, text)
            case "called":
                self._index += 1
                return CallEnded(self._index - 1)
        return ReasoningSaid(text) if kind == "reasoning" else TextSaid(text)

    def _in_text(self, said: list[Said]) -> bool:
        """Look for the beginning of a call; whether there is more to do."""
        starts = self._starts
        if self._after:
            if not self._skip_closers():
                return False
            starts = (*starts, *self._form.again)
        at, start = self._find(starts)
        if start:
            before = self._held[:at].rstrip(_SPACE)
            self._say(said, before)
            self._raw, self._held = self._held[len(before) : at], self._held[at:]
            self._start = self._raw + start
            self._reader = self._new_reader()
            return True
        keep = undecided(self._held, starts)
        before = self._held[: len(self._held) - keep]
        if self._form.at_start and (not self._at_start or before.strip()):
            before = self._held
        else:
            before = before.rstrip(_SPACE) if starts else before
        self._say(said, before)
        self._held = self._held[len(before) :]
        return False

    def _find(self, starts: tuple[str, ...]) -> tuple[int, str]:
        """Where a call begins, and with what; "" if none does."""
        found = [(at, -len(start), start) for start in starts if (at := self._held.find(start)) >= 0]
        if self._form.at_start or self._after:
            edge = len(self._held) - len(self._held.lstrip(_SPACE))
            again = () if self._form.at_start else self._starts
            found = [item for item in found if (item[0] == edge and self._at_start_or_after) or item[2] in again]
        at, _length, start = min(found, default=(0, 0, ""))
        return at, start

    @property
    def _at_start_or_after(self) -> bool:
        return self._at_start or self._after

    def _say(self, said: list[Said], text: str) -> None:
        if text:
            said.append(TextSaid(text))
            self._after = False
            self._at_start = self._at_start and not text.strip()

    def _skip_closers(self) -> bool:
        """After a call: drop white space and what closes calls. False if more must come to decide."""
        closers = self._form.closers
        while True:
            self._held = self._held.lstrip(_SPACE)
            closer = next((c for c in closers if self._held.startswith(c)), None)
            if closer is None:
                return not any(c.startswith(self._held) for c in (*closers, *self._starts))
            self._held = self._held[len(closer) :]

    def _new_reader(self) -> CallReader:
        form = self._form
        if form.arguments == "xml":
            return TagCall(form.before, self._properties)
        if form.head is None:
            return JsonCall(form.before, self._names)
        return NamedCall(form.before, self._names, re.compile(form.head))

    def _in_call(self, said: list[Said]) -> bool:
        reader = self._reader
        assert reader is not None
        if not self._held:
            return False
        events, taken = reader.feed(self._held)
        self._raw += self._held[:taken]
        self._held = self._held[taken:]
        for kind, text in events:
            if kind == "name":
                said.append(CallBegun(self._index, new_call_id(), text))
            elif text:
                said.append(CallArguments(self._index, text))
        if reader.broken and not reader.named:
            self._reader, self._held = None, self._raw + self._held
            self._say(said, self._held[: len(self._start)])
            self._held = self._held[len(self._start) :]
            return True
        if reader.done or reader.broken:
            said.append(CallEnded(self._index))
            self._reader, self._after, self._at_start = None, True, False
            self._index += 1
            return True
        return False


def _properties(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = function_of(tool).get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def _joined(said: list[Said]) -> list[Said]:
    """Neighboring pieces of one kind as one."""
    joined: list[Said] = []
    for event in said:
        last = joined[-1] if joined else None
        if isinstance(event, (TextSaid, ReasoningSaid)) and type(last) is type(event):
            joined[-1] = type(event)(last.text + event.text)
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            joined[-1] = CallArguments(event.index, last.text + event.text)
        else:
            joined.append(event)
    return joined
