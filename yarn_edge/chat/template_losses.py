"""What a prompt must hold of its messages and tools: a template may not lose it in silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yarn_edge.chat.given_text import Shown
from yarn_edge.chat.template_literals import without_marked

_LOSSES = {
    "user": "makes a prompt without all of the user's last message; {remedy}",
    "system": "makes a prompt without all of the system message: put that text into the user's message",
    "developer": "makes a prompt without all of the developer's message: put that text into the user's message",
    "tool": "makes a prompt without all of a tool's result; {remedy}",
    "assistant": "makes a prompt without all of the message to continue, or of a call before the results of tools; {remedy}",
    "tools": "makes a prompt without the name of every tool; {remedy}",
    "documents": "makes a prompt without all documents: put their text into the user's message",
}


def loss(what: str, remedy: str) -> str:
    """The sentence about it. what: a role, tools or documents."""
    return _LOSSES[what].format(remedy=remedy)


def lost(prompt: str, messages: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str | None:
    """What the prompt must hold, and does not; None if it holds all. given: tools, documents, continue_final_message."""
    shown = Shown(without_marked(prompt))

    def has(text: object) -> bool:
        return not isinstance(text, str) or shown.has(without_marked(text))

    users = [n for n, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else 0
    needed = [messages[n] for n in users[-1:]]
    needed += [message for message in messages if message["role"] in ("system", "developer")]
    needed += [message for message in messages[last:] if message["role"] == "tool"]
    if given.get("continue_final_message"):
        needed.append(messages[-1])
    for message in needed:
        if not has(message.get("content")):
            return str(message["role"])
    for message in messages[last:]:
        if not all(has(call["function"]["name"]) for call in message.get("tool_calls") or ()):
            return "assistant"
    if not all(has(tool.get("function", tool).get("name")) for tool in given.get("tools") or ()):
        return "tools"
    documents = given.get("documents") or ()
    return None if all(has(document.get("text")) for document in documents) else "documents"
