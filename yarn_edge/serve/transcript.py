"""The messages of a conversation in Hugging Face's form, which chat templates read. Interfaces say who said what, in any order."""

from __future__ import annotations

import json
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import brief


class Transcript:
    """What was said so far. `messages` is for the chat template."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # of the functions that were called, by the call
        self._open: dict[str, Any] | None = None  # the assistant's message that may go on

    def new_turn(self) -> None:
        """What the assistant says next is a message of its own."""
        self._open = None

    def say(self, role: str, text: str) -> None:
        """Somebody says something: system, developer, user or assistant."""
        if role != "assistant":
            self.new_turn()
            self.messages.append({"role": role, "content": text})
            return
        if self._open is not None and (self._open["content"] or "tool_calls" in self._open):
            self.new_turn()
        self._assistant()["content"] = text

    def think(self, text: str) -> None:
        """The assistant thinks, before it says something."""
        if self._open is not None and (self._open["content"] or "tool_calls" in self._open):
            self.new_turn()
        message = self._assistant()
        if text:
            message["reasoning_content"] = message.get("reasoning_content", "") + text

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """The assistant calls a function."""
        self._names[call_id] = name
        function = {"name": name, "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"type": "function", "id": call_id, "function": function})

    def result(self, call_id: str, text: str, where: str) -> None:
        """What a function returned. Raises YarnEdgeError, which names the field `where`, if nothing has called it."""
        if call_id not in self._names:
            raise YarnEdgeError(f"{where} is {brief(call_id)}, but no tool call before it has that id")
        self.new_turn()
        self.messages.append({"role": "tool", "tool_call_id": call_id, "name": self._names[call_id], "content": text})

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"role": "assistant", "content": ""}
            self.messages.append(self._open)
        return self._open


def arguments_of(text: Any, where: str) -> dict[str, Any]:
    """The arguments of a call, which interfaces give as the text of a JSON object. Raises YarnEdgeError that names the field."""
    try:
        value = json.loads(text) if isinstance(text, str) and text.strip() else {} if text == "" else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise YarnEdgeError(f"{where} is {brief(text)}, but must be the text of a JSON object")
    return value
