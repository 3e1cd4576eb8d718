"""A message of a chat request as role and text. What else it holds is an error that names the field, such as messages[2].tool_calls."""

from __future__ import annotations

from typing import Any

from yarn_edge.chat.template import Message
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import Accepted, brief, refuse_unknown

# Roles of requests -> roles that chat templates know.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# Fields without an effect on the answer: hints for a cache, and the thoughts in answers (ours too) that clients send back. Only the
# assistant has thoughts.
_HINTS = ("cache_control",)
_THOUGHTS = ("reasoning_content", "reasoning")
_AS_IT_IS: Accepted = {"prefix": (False,), "partial": (False,)}


def chat_message(given: Any, where: str) -> Message:
    """Role and text for a chat template. where: the message's name in errors. Raises YarnEdgeError for what is not text."""
    if not isinstance(given, dict):
        raise YarnEdgeError(f"{where} is not an object with role and content")
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise YarnEdgeError(f"{where}.role is {brief(role)}, but only {', '.join(ROLES)} are supported")
    read = {"role", "content", *_HINTS, *(_THOUGHTS if role == "assistant" else ())}
    refuse_unknown({name: value for name, value in given.items() if name not in read}, _AS_IT_IS, f"{where}.")
    content, field = given.get("content"), f"{where}.content"
    if role == "assistant" and content in (None, []):  # it said nothing, or only thought
        content = ""
    return {"role": ROLES[role], "content": _text(content, field)}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise YarnEdgeError(f"{where} is {brief(content)}, but must be text or a list of text parts")
    return "\n".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else part
    if not isinstance(part, dict) or kind != "text":
        raise YarnEdgeError(f"{where}: a part of type {brief(kind)} is not supported, only text")
    text = part.get("text")
    if not isinstance(text, str):
        raise YarnEdgeError(f"{where}.text is {brief(text)}, but must be text")
    read = ("type", "text", *_HINTS)
    refuse_unknown({name: value for name, value in part.items() if name not in read}, {}, f"{where}.")
    return text
