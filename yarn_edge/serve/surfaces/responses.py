"""POST /v1/responses, without a memory: every request holds the whole conversation, and nothing is stored."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import Accepted, brief, refuse_unknown
from yarn_edge.serve.parts import ToolWords, an_object, chosen_tools, effort_of, json_form, one_name, string, text_of
from yarn_edge.serve.question import Question
from yarn_edge.serve.requests import Sampled, alternatives
from yarn_edge.serve.transcript import Transcript, arguments_of

TOOL_WORDS = ToolWords(("function",), "", "parameters")
_ROLES = ("system", "developer", "user", "assistant")
_TEXTS = ("input_text", "output_text", "text")
# Fields of items that do not matter here: what they are called, and how far they had come.
_LABELS = ("type", "id", "status", "phase")
_OF_ITEMS: Accepted = {"caller": ({"type": "direct"},), "async": (False,)}
_OF_REASONING: Accepted = {
    "summary": ("auto", "concise", "detailed"),
    "generate_summary": ("auto", "concise", "detailed"),
    "context": ("auto",),
    "mode": ("standard",),
}
_OF_TEXT: Accepted = {"verbosity": ("medium",)}
# What may be included: thoughts come in the clear, and log-probabilities with top_logprobs.
_INCLUDED = ("reasoning.encrypted_content", "message.output_text.logprobs")


class ResponsesRequest(Sampled):
    """POST /v1/responses."""

    input: Any
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[Any] | None = None
    top_logprobs: Any = None
    stream_options: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        for number, wanted in enumerate(self.include or ()):
            one_name(wanted, _INCLUDED, f"include[{number}]")
        refuse_unknown(self.stream_options or {}, {"include_obfuscation": (True, False)}, "stream_options.")
        refuse_unknown(self.reasoning or {}, _OF_REASONING, "reasoning.", ("effort",))
        refuse_unknown(self.text or {}, _OF_TEXT, "text.", ("format",))

    @property
    def items(self) -> list[Any]:
        return self.input if isinstance(self.input, list) else []

    def question(self, usual: Sampling) -> Question:
        effort = effort_of((self.reasoning or {}).get("effort"), "reasoning.effort")
        told = self.top_logprobs or 0
        wants = bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())
        return Question(
            messages=self.as_messages(),
            tools=chosen_tools(self.tools, self.tool_choice, self.parallel_tool_calls, TOOL_WORDS),
            form=json_form((self.text or {}).get("format"), "text.format"),
            options=effort["options"],
            hints=effort["hints"],
            sampling=self.sampling(usual),
            max_tokens=self.max_output_tokens,
            top_logprobs=alternatives(told, "top_logprobs") if wants else None,
            stream=self.stream,
            cache_key=self.cache_key,
        )

    def as_messages(self) -> list[dict[str, Any]]:
        """The conversation for a chat template. Raises YarnEdgeError that names the field of what is not supported."""
        transcript = Transcript()
        if self.instructions:
            transcript.say("system", self.instructions)
        if isinstance(self.input, str):
            transcript.say("user", self.input)
        elif isinstance(self.input, list) and self.input:
            for number, item in enumerate(self.input):
                _tell(transcript, item, f"input[{number}]")
        else:
            raise YarnEdgeError(f"input is {brief(self.input)}, but must be a text or a list of items")
        return transcript.messages


def _message(transcript: Transcript, item: dict[str, Any], where: str) -> tuple[str, ...]:
    role = one_name(item.get("role"), _ROLES, f"{where}.role")
    content = item.get("content")
    empty = role == "assistant" and content == []
    transcript.say(role, "" if empty else text_of(content, f"{where}.content", _TEXTS))
    return "role", "content"


def _reasoning(transcript: Transcript, item: dict[str, Any], where: str) -> tuple[str, ...]:
    """Thoughts in the clear; a summary is of thoughts that are not there."""
    content = item.get("content") or []
    transcript.think(text_of(content, f"{where}.content", ("reasoning_text", "text")) if content else "")
    return "content", "summary"


def _function_call(transcript: Transcript, item: dict[str, Any], where: str) -> tuple[str, ...]:
    arguments = arguments_of(item.get("arguments"), f"{where}.arguments")
    transcript.call(string(item, "call_id", where), string(item, "name", where), arguments)
    return "arguments", "call_id", "name"


def _function_call_output(transcript: Transcript, item: dict[str, Any], where: str) -> tuple[str, ...]:
    output = text_of(item.get("output"), f"{where}.output", _TEXTS)
    transcript.result(string(item, "call_id", where), output, f"{where}.call_id")
    return "output", "call_id", "name"


_ITEMS = {
    "message": _message,
    "reasoning": _reasoning,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
}


def _tell(transcript: Transcript, given: Any, where: str) -> None:
    """Add an item to a conversation. where: its name in errors."""
    item = an_object(given, where)
    kind = one_name(item.get("type", "message"), _ITEMS, f"{where}.type")
    read = _ITEMS[kind](transcript, item, where)
    refuse_unknown(item, _OF_ITEMS, f"{where}.", (*read, *_LABELS))
