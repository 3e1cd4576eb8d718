"""In which form a template reads what it is given: tried out once, as llama.cpp does, in the process that renders it.

Most templates read a message's content as text, some as a list of parts ({"type": "text", "text": …}); a message of calls has the
content "" for most, None for some; the arguments of a call are an object for most, JSON in a text for some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from yarn_edge.chat.given_text import NEEDLE

Given = Sequence[Mapping[str, Any]]
_CALLED = "needle_function"
_CALL = {"type": "function", "id": "needle000", "function": {"name": _CALLED, "arguments": {"needle": NEEDLE}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "trial",
        "description": "A trial.",
        "parameters": {"type": "object", "properties": {"needle": {"type": "string", "description": "Any."}}},
    },
}
_USER = {"role": "user", "content": "Hello"}
_CALLING = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
# role -> the shortest conversation in which a template renders a message of this role, and its place there.
_TRIALS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "user": ([{"role": "user"}], 0),
    "system": ([{"role": "system"}, _USER], 0),
    "developer": ([{"role": "developer"}, _USER], 0),
    "assistant": ([_USER, {"role": "assistant"}, _USER], 1),
    "tool": ([_USER, _CALLING, {"role": "tool", "tool_call_id": "needle000", "name": _CALLED}], 2),
}


class TemplateForms:
    """render: (messages, tools) -> the text; it raises what the template raises."""

    def __init__(self, render: Callable[[Given, list[Any] | None], str]) -> None:
        self._render = render
        self._parts: dict[str, bool] = {}  # by role: whether it reads parts
        self._calls: tuple[str | None, bool] | None = None  # content of a message of calls; arguments as a text

    def given(self, messages: Given) -> list[dict[str, Any]]:
        """The messages in the form that the template reads."""
        if self._calls is None and any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
            self._calls = self._calls_read()
        for role in dict.fromkeys(("user", *(message["role"] for message in messages))):
            if role not in self._parts:
                self._parts[role] = self._needs_parts(role)
        return self._formed(messages, self._parts)

    def _formed(self, messages: Given, parts: Mapping[str, bool]) -> list[dict[str, Any]]:
        empty, as_text = self._calls or ("", False)
        formed = []
        for message in messages:
            new = {**message, "content": message.get("content")}
            if message.get("tool_calls"):
                new["tool_calls"] = [_with_arguments(call, as_text) for call in message["tool_calls"]]
            if message.get("tool_calls") and not new["content"]:
                new["content"] = empty
            elif new["content"] is not None:
                new["content"] = _content(new["content"], parts.get(message["role"], False))
            formed.append(new)
        return formed

    def _calls_read(self) -> tuple[str | None, bool]:
        forms: list[tuple[str | None, bool]] = [(empty, text) for empty in ("", None) for text in (False, True)]
        done = {"role": "tool", "content": "Done", "tool_call_id": "needle000", "name": _CALLED}
        trial: list[Mapping[str, Any]] = [_USER, _CALLING, done]
        for self._calls in forms:
            for tools in ([_TOOL], None):
                try:
                    text = self._render(self._formed(trial, {}), tools)
                except Exception:  # it reads another form
                    continue
                arguments = _CALL["function"]["arguments"]  # type: ignore[index]
                twice = json.dumps(json.dumps(arguments))
                if _CALLED in text and NEEDLE in text and repr(arguments) not in text and twice not in text:
                    return self._calls
        return forms[0]

    def _needs_parts(self, role: str) -> bool:
        """Whether text is lost and parts are not; where both are, what holds for the user."""
        if self._shows(role, parts=False):
            return False
        return self._shows(role, parts=True) or self._parts.get("user", False)

    def _shows(self, role: str, parts: bool) -> bool:
        trial, at = _TRIALS[role]
        messages = [{**message, "content": NEEDLE} if n == at else message for n, message in enumerate(trial)]
        try:
            text = self._render(self._formed(messages, {**self._parts, role: parts}), None)
        except Exception:  # it reads the other form
            return False
        part = _content(NEEDLE, parts=True)[0]
        return NEEDLE.casefold() in text.casefold() and not (repr(part) in text or json.dumps(part) in text)


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _with_arguments(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    function = dict(call["function"])
    if as_text and not isinstance(function.get("arguments"), str):
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": function}
