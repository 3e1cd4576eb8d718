"""Tools for models whose template has no form for them, or none that can be read: as text, calls in the form of Hermes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_BEFORE = "You can call functions. Each line in <tools> describes one:\n<tools>\n"
_AFTER = (
    "\n</tools>\nTo call a function, write its name and arguments as JSON, and nothing after it:\n"
    '<tool_call>\n{"name": "the function\'s name", "arguments": {"an argument": "its value"}}\n</tool_call>'
)


def with_tools_as_text(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The messages with tools in the system message, calls in the assistant's text, and results in messages of the user."""
    own: list[dict[str, Any]] = []
    for message in messages:
        new = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        if message.get("tool_calls"):
            calls = [call_as_text(call["function"]) for call in message["tool_calls"]]
            new["content"] = "\n".join(filter(None, [message.get("content"), *calls]))
        if message["role"] == "tool":
            result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if own and own[-1].get("of_tools"):
                own[-1]["content"] += f"\n{result}"
                continue
            new = {"role": "user", "content": result, "of_tools": True}
        own.append(new)
    for message in own:
        message.pop("of_tools", None)
    if tools:
        lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        text = _BEFORE + lines + _AFTER
        if own and own[0]["role"] == "system":
            own[0] = {**own[0], "content": f"{own[0]['content']}\n\n{text}"}
        else:
            own.insert(0, {"role": "system", "content": text})
    return own


def call_as_text(function: Mapping[str, Any]) -> str:
    """A call as the model would have written it."""
    call = {"name": function["name"], "arguments": function.get("arguments", {})}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"
