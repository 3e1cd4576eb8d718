"""Readers of one call each, fed piece by piece: JSON with a name in it, a name before JSON, and tags.

`done` says that a call is over, `broken` that this is none, or that it went wrong after its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from yarn_edge.chat.tools.call_grammar import arguments_value

MAX_HEAD = 500  # characters before a call's name is known; then it is text
_SPACE = " \t\r\n"
Event = tuple[str, str]  # ("name" or "arguments", text)


class JsonScan:
    """Finds where a JSON value ends, by brackets and quotes."""

    def __init__(self) -> None:
        self._depth, self._in_text, self._escaped, self._scalar = 0, False, False, False

    def take(self, text: str, at: int) -> tuple[int, bool]:
        """(where it stopped, whether the value is over). Of a number or word, the end is the first character after it."""
        for n in range(at, len(text)):
            character = text[n]
            if self._in_text:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_text = False
                    if not self._depth:
                        return n + 1, True
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                if not self._depth:
                    return n, True
                self._depth -= 1
                if not self._depth:
                    return n + 1, True
            elif not self._depth and self._scalar and character in _SPACE + ",":
                return n, True
            elif not self._depth and character not in _SPACE:
                self._scalar = True
        return len(text), False


class CallReader:
    """What readers share. before: texts that may stand before the call, each of which is skipped if it is there."""

    def __init__(self, before: Sequence[str]) -> None:
        self._before, self._head = list(before), ""
        self.done = self.broken = self.named = False

    def feed(self, text: str) -> tuple[list[Event], int]:
        """Events, and how many characters were taken: all, unless the call is over or was none."""
        if not self._before:
            return self.read(text)
        self._head += text
        while self._before:
            self._head = self._head.lstrip(_SPACE)
            first = self._before[0]
            if first.startswith(self._head) and first != self._head:
                return [], len(text)
            self._before.pop(0)
            self._head = self._head.removeprefix(first)
        head, self._head = self._head, ""
        events, taken = self.read(head)
        return events, len(text) - (len(head) - taken)

    def read(self, text: str) -> tuple[list[Event], int]:
        """The same for the call itself."""
        raise NotImplementedError


class JsonCall(CallReader):
    """{"name": …, "arguments" or "parameters": …} with other members around them."""

    _KEYS = ("name", "arguments", "parameters", "id", "type", "function")
    _FOLLOWING: Mapping[str, Mapping[str, str]] = {
        "open": {"{": "first"},
        "first": {'"': "key", "}": "over"},
        "colon": {":": "before"},
        "before": {},
        "after": {",": "again", "}": "over"},
        "again": {'"': "key"},
    }

    def __init__(self, before: Sequence[str], names: Sequence[str]) -> None:
        super().__init__(before)
        self._names, self._state, self._key = names, "open", ""
        self._value, self._scan = "", JsonScan()
        self._early, self._told = "", False  # arguments before the name, or in a text; whether they have been told

    def read(self, text: str) -> tuple[list[Event], int]:
        """Events, and the number of characters taken."""
        events: list[Event] = []
        at = 0
        while at < len(text) and not self.done and not self.broken:
            if self._state in ("key", "value"):
                at = self._member(text, at, events)
            elif text[at] in _SPACE:
                at += 1
            else:
                self._next(text[at])
                at += self._state not in ("key", "value", "broken")
        if self.done and not self.named:
            self.done, self.broken = False, True
        elif self.done and not self._told:
            events.append(("arguments", self._early or "{}"))
        return events, at

    def _next(self, character: str) -> None:
        state = self._FOLLOWING[self._state].get(character, "broken")
        if self._state == "before" and character not in ",}]:":
            state = "value"
        if state in ("key", "value"):
            self._value, self._scan = "", JsonScan()
        self._state, self.done, self.broken = state, state == "over", state == "broken"

    def _member(self, text: str, at: int, events: list[Event]) -> int:
        end, over = self._scan.take(text, at)
        piece, self._value = text[at:end], self._value + text[at:end]
        arguments = self._key in ("arguments", "parameters")
        if self._state == "key":
            if over:
                self._key, self._state = str(_parsed(self._value)), "colon"
                self.broken = not self.named and self._key not in self._KEYS
            return end
        if arguments and not self._value.startswith('"'):
            self._arguments(piece, events)
        if over:
            self._state = "after"
            if self._key == "name" and not self.named:
                self._name(_parsed(self._value), events)
            elif arguments and self._value.startswith('"') and isinstance(inside := _parsed(self._value), str):
                self._arguments(inside, events)
        return end

    def _arguments(self, text: str, events: list[Event]) -> None:
        if self.named:
            self._told = True
            events.append(("arguments", text))
        else:
            self._early += text

    def _name(self, value: Any, events: list[Event]) -> None:
        if value not in self._names:
            self.broken = True
            return
        self.named = True
        events.append(("name", str(value)))
        if self._early:
            self._arguments(self._early, events)


class NamedCall(CallReader):
    """A name, other text up to the arguments' opening brace, the arguments. head: the form's text around the name."""

    def __init__(self, before: Sequence[str], names: Sequence[str], head: re.Pattern[str]) -> None:
        super().__init__(before)
        self._names, self._pattern, self._said, self._scan = names, head, "", JsonScan()

    def read(self, text: str) -> tuple[list[Event], int]:
        """Events, and the number of characters taken."""
        if self.named:
            end, self.done = self._scan.take(text, 0)
            return ([("arguments", text[:end])] if end else []), end
        before = len(self._said)
        self._said += text
        brace = self._said.find("{")
        if brace < 0:
            self.broken = len(self._said) > MAX_HEAD
            return [], len(text)
        found = self._pattern.fullmatch(self._said[:brace]) if brace <= MAX_HEAD else None
        if not found or found["name"] not in self._names:
            self.broken = True
            return [], brace - before
        self.named = True
        events, taken = self.read(self._said[brace:])
        return [("name", found["name"]), *events], brace - before + taken


class TagCall(CallReader):
    """<function=name>, <parameter=key>, a value, </parameter>, …, </function>. schemas: of the functions' properties."""

    _FUNCTION = re.compile(r"\s*(?:<function=)?\s*([^>\s]+)\s*>")
    _PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
    _END = re.compile(r"\s*</function>")
    _VALUE = re.compile(r"\n?</parameter>")

    def __init__(self, before: Sequence[str], properties: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(before)
        self._properties, self._said, self._own = properties, "", {}
        self._state, self._key, self._count = self._function, "", 0

    _own: Mapping[str, Any]
    _state: Callable[[], list[Event] | None]

    def read(self, text: str) -> tuple[list[Event], int]:
        """Events, and the number of characters taken: all that is not behind the call."""
        self._said += text
        events: list[Event] = []
        while not self.done and not self.broken:
            more = self._state()
            if more is None:
                break
            events += more
        return events, len(text) - (len(self._said) if self.done else 0)

    def _cut(self, pattern: re.Pattern[str], search: bool = False) -> re.Match[str] | None:
        found = pattern.search(self._said) if search else pattern.match(self._said)
        if found:
            self._said = self._said[found.end() :]
        return found

    def _function(self) -> list[Event] | None:
        found = self._cut(self._FUNCTION)
        if not found:
            self.broken = ">" in self._said or len(self._said) > MAX_HEAD
            return None
        if found[1] not in self._properties:
            self.broken = True
            return None
        self.named, self._own, self._state = True, self._properties[found[1]], self._between
        return [("name", found[1]), ("arguments", "{")]

    def _between(self) -> list[Event] | None:
        if self._cut(self._END):
            self.done = True
            return [("arguments", "}")]
        said = self._said
        parameter = self._PARAMETER.match(said)
        if not parameter:
            self.broken = not _may_become(said.lstrip(), ("</function>", "<parameter="))
            return None
        if parameter.end() == len(said) and not parameter[0].endswith("\n"):
            return None  # a line break may follow
        self._cut(self._PARAMETER)
        self._key, self._state = parameter[1], self._in_value
        return []

    def _in_value(self) -> list[Event] | None:
        said = self._said
        found = self._cut(self._VALUE, search=True)
        if not found:
            return None
        value = arguments_value(said[: found.start()], self._own.get(self._key))
        comma = ", " if self._count else ""
        self._count, self._state = self._count + 1, self._between
        return [("arguments", f"{comma}{json.dumps(self._key)}: {json.dumps(value, ensure_ascii=False)}")]


def _may_become(text: str, wholes: Sequence[str]) -> bool:
    return any(whole.startswith(text) or text.startswith(whole) for whole in wholes)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
