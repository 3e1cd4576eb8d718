"""How a prompt is to be made besides its messages, and what is given to the template for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yarn_edge.chat.tools.forms import tool_form
from yarn_edge.chat.tools.generic import with_tools_as_text
from yarn_edge.errors import YarnEdgeError, one_line

ROLES = ("system", "developer", "user", "assistant", "tool")
_TAG = "ContinueFromHere "  # with a space, so that it shows whether the template trims
_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token"}
# transformers 5, utils/chat_template_utils.py, _alias_reasoning_fields.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_SHORT_IDS = re.compile(r"id\s*\|\s*length\s*!=\s*9|\['(?:tool_call_)?id'\]\s*\|\s*length\s*!=\s*9")


@dataclass(frozen=True)
class TemplateOptions:
    """add_generation_prompt: end where the assistant answers. continue_final_message: end inside the last message, the assistant's.

    enable_thinking, chat_template_kwargs: variables of the template. documents: [{"title", "text"}], for templates that read them.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    enable_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] = ()

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the template by name."""
        thinking = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.chat_template_kwargs, **thinking}

    def check(self, source: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises YarnEdgeError for what this template cannot be asked."""
        for name, value in self.variables.items():
            if name in _OWN or not name.isidentifier():
                raise YarnEdgeError(f"chat_template_kwargs.{one_line(name, 60)} cannot be set")
            if not re.search(rf"\b{name}\b", source) and (name, value) != ("enable_thinking", False):
                raise YarnEdgeError(f"does not read {one_line(name, 60)} (chat_template_kwargs)")
        if self.documents and not re.search(r"\bdocuments\b", source):
            raise YarnEdgeError("does not read documents: put their text into the user's message")
        for message in messages:
            if message["role"] not in ROLES:
                raise YarnEdgeError(
                    f"a message's role is {one_line(repr(message['role']), 60)}, not one of {', '.join(ROLES)}"
                )
        if self.continue_final_message and (
            not messages or messages[-1]["role"] != "assistant" or not messages[-1].get("content")
        ):
            raise YarnEdgeError("continue_final_message needs a last message of the assistant, with content")

    def cut(self, rendered: str) -> str:
        """The prompt: of a message to continue, nothing after it."""
        if not self.continue_final_message:
            return rendered
        before, tag, after = rendered.rpartition(_TAG.strip())
        if not tag:
            return ""
        return before if after.startswith(" ") else before.rstrip()

    def without_tag(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages as they were given."""
        if not self.continue_final_message:
            return list(messages)
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"].removesuffix(_TAG)}]


def prepared(
    source: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], asked: TemplateOptions
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the messages, what else the template is given). Where the template knows no tools or no developer, it need not."""
    own = [_with_reasoning(dict(message)) for message in messages]
    if not re.search(r"\bdeveloper\b", source):
        own = [{**message, "role": "system"} if message["role"] == "developer" else message for message in own]
    if tool_form(source).generic and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in own)):
        own, tools = with_tools_as_text(own, tools), ()
    if _SHORT_IDS.search(source):
        own = [_with_short_ids(message) for message in own]
    if asked.continue_final_message:
        own[-1] = {**own[-1], "content": own[-1]["content"] + _TAG}
    given = {
        "add_generation_prompt": asked.add_generation_prompt and not asked.continue_final_message,
        **({"tools": list(tools)} if tools else {}),
        **({"documents": list(asked.documents)} if asked.documents else {}),
        **asked.variables,
    }
    return own, given


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name)), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """For Mistral, whose ids have nine letters and digits."""
    if message.get("tool_calls"):
        calls = [{**call, "id": _short(call.get("id", ""))} for call in message["tool_calls"]]
        message = {**message, "tool_calls": calls}
    if "tool_call_id" in message:
        message = {**message, "tool_call_id": _short(message["tool_call_id"])}
    return message


def _short(identity: str) -> str:
    if len(identity) == 9 and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.sha256(identity.encode(errors="surrogatepass")).hexdigest()[:9]
