"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients know them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from yarn_edge.engine.sampling import Sampling
from yarn_edge.serve.blocks import AnswerBlock, AnswerBlocks, AnswerStep, BlockKind
from yarn_edge.serve.fields import Accepted, refuse_unknown
from yarn_edge.serve.parts import (
    HINTS,
    ToolWords,
    an_object,
    effort_of,
    json_form,
    one_name,
    string,
    text_of,
    text_part,
    tools_of,
)
from yarn_edge.serve.question import Choice, Question, Tools
from yarn_edge.serve.requests import Sampled, stop_texts
from yarn_edge.serve.transcript import Transcript
from yarn_edge.serve.writing import Event, Writer

TOOL_WORDS = ToolWords((None, "custom"), "", "input_schema")
_CHOICES: dict[str, Choice] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}
_THINKING = ("enabled", "adaptive", "disabled", "between_tools")
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
# This server checks no signatures, but clients send thoughts back only with one.
SIGNATURE = "unsigned"


class CountRequest(Sampled):
    """POST /v1/messages/count_tokens."""

    as_it_is = {  # noqa: RUF012  a row
        "context_management": ({"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},)
    }

    messages: list[Any] = Field(min_length=1)
    system: Any = None
    tools: Any = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    stop_sequences: Any = None

    @property
    def items(self) -> list[Any]:
        return self.messages

    @property
    def most_tokens(self) -> int | None:
        """Maximum length of the answer."""
        return None

    def question(self, usual: Sampling) -> Question:
        messages = self.as_messages()
        config = self.output_config or {}
        refuse_unknown(config, {}, "output_config.", ("effort", "format"))
        effort = effort_of(config.get("effort"), "output_config.effort")
        return Question(
            messages=messages,
            tools=self._tools(),
            form=json_form(config.get("format"), "output_config.format"),
            options=effort["options"],
            hints={**effort["hints"], **self._thinks()},
            continues=messages[-1]["role"] == "assistant",
            sampling=self.sampling(usual),
            max_tokens=self.most_tokens,
            stops=stop_texts(self.stop_sequences, "stop_sequences"),
            stream=self.stream,
            cache_key=self.cache_key,
        )

    def as_messages(self) -> list[dict[str, Any]]:
        """The conversation for a chat template. Raises YarnEdgeError that names the field of what is not supported."""
        transcript = Transcript()
        if self.system not in (None, "", []):
            transcript.say("system", text_of(self.system, "system"))
        for number, message in enumerate(self.messages):
            _tell(transcript, message, f"messages[{number}]")
        return transcript.messages

    def _tools(self) -> Tools:
        choice = self.tool_choice or {"type": "auto"}
        kind = one_name(choice.get("type"), _CHOICES, "tool_choice.type")
        function = string(choice, "name", "tool_choice") if kind == "tool" else ""
        parallel = choice.get("disable_parallel_tool_use") is not True
        return Tools(tools_of(self.tools, TOOL_WORDS), _CHOICES[kind], function, parallel)

    def _thinks(self) -> dict[str, Any]:
        """Whether the model is to think: for templates that ask."""
        if self.thinking is None:
            return {}
        kind = one_name(self.thinking.get("type"), _THINKING, "thinking.type")
        refuse_unknown(self.thinking, {"display": ("summarized",)}, "thinking.", ("type", "budget_tokens"))
        return {} if kind in ("adaptive", "between_tools") else {"enable_thinking": kind == "enabled"}


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens


_ROLES = ("user", "assistant", "system")


def _tell(transcript: Transcript, given: Any, where: str) -> None:
    """Add a message to a conversation. where: its name in errors."""
    message = an_object(given, where)
    role, content = one_name(message.get("role"), _ROLES, f"{where}.role"), message.get("content")
    refuse_unknown(message, {}, f"{where}.", ("role", "content", *HINTS))
    transcript.new_turn()
    if role == "assistant" and content == []:
        transcript.say(role, "")
    elif not isinstance(content, list) or not content:
        transcript.say(role, text_of(content, f"{where}.content"))
    else:
        _tell_blocks(transcript, role, content, f"{where}.content")


def _tell_blocks(transcript: Transcript, role: str, blocks: list[Any], where: str) -> None:
    """Texts next to each other are one message; results of tools are messages of their own."""
    texts: list[str] = []

    def said() -> None:
        if texts:
            transcript.say(role, "\n".join(texts))
            texts.clear()

    for number, given in enumerate(blocks):
        place = f"{where}[{number}]"
        kind = given.get("type") if isinstance(given, dict) else given
        tell = _BLOCKS.get((role, kind)) if isinstance(kind, str) else None
        if tell is None:
            texts.append(text_part(given, place))
        else:
            said()
            tell(transcript, given, place)
    said()


def _thinking(transcript: Transcript, block: dict[str, Any], where: str) -> None:
    transcript.think(string(block, "thinking", where))


def _tool_use(transcript: Transcript, block: dict[str, Any], where: str) -> None:
    arguments = an_object(block.get("input"), f"{where}.input")
    transcript.call(string(block, "id", where), string(block, "name", where), arguments)
    accepted: Accepted = {"caller": ({"type": "direct"},)}
    refuse_unknown(block, accepted, f"{where}.", ("type", "id", "name", "input", *HINTS))


def _tool_result(transcript: Transcript, block: dict[str, Any], where: str) -> None:
    content = block.get("content")
    text = "" if content in (None, []) else text_of(content, f"{where}.content")
    failed = block.get("is_error") is True
    transcript.result(string(block, "tool_use_id", where), f"Error: {text}" if failed else text, f"{where}.tool_use_id")
    refuse_unknown(block, {}, f"{where}.", ("type", "tool_use_id", "content", "is_error", *HINTS))


_BLOCKS = {
    ("assistant", "thinking"): _thinking,
    ("assistant", "tool_use"): _tool_use,
    ("user", "tool_result"): _tool_result,
}
# By kind of block: what it begins as in a stream, the kind and the field of its deltas.
_EMPTY: dict[BlockKind, dict[str, Any]] = {
    "reasoning": {"type": "thinking", "thinking": "", "signature": ""},
    "answer": {"type": "text", "text": ""},
    "call": {"type": "tool_use", "input": {}},
}
_DELTAS: dict[BlockKind, tuple[str, str]] = {
    "reasoning": ("thinking_delta", "thinking"),
    "answer": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


class MessagesWriter(Writer):
    """A message, or the events of which it is made."""

    def whole(self, answers: Sequence[AnswerBlocks]) -> dict[str, Any]:
        answer = answers[0]
        content = [_content(block) for block in answer.blocks]
        return {**self._message(answer), "content": content, **self._end_of(answer)}

    def _message(self, answer: AnswerBlocks) -> dict[str, Any]:
        same = {"id": f"msg_{self.head.number}", "type": "message", "role": "assistant", "model": self.head.model}
        end: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return {**same, **end, "usage": self._usage(answer)}

    def _usage(self, answer: AnswerBlocks) -> dict[str, Any]:
        """Anthropic's input tokens are those that were not in the cache."""
        cached = answer.cached or 0
        counts = {"input_tokens": self.head.n_prompt - cached, "output_tokens": answer.generated}
        return {**counts, "cache_creation_input_tokens": 0, "cache_read_input_tokens": cached}

    def _end_of(self, answer: AnswerBlocks) -> dict[str, Any]:
        reason = "stop_sequence" if answer.stopped_by is not None else _REASONS[answer.reason]
        if answer.context_full:
            reason = "model_context_window_exceeded"
        return {"stop_reason": reason, "stop_sequence": answer.stopped_by}

    def begin(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        yield _event("message_start", message=self._message(answers[0]))

    def step(self, step: AnswerStep) -> Iterator[Event]:
        block = step.block
        if block is None:
            return
        if step.what == "begun":
            begun = {**_EMPTY[block.kind], **({"id": block.id, "name": block.name} if block.kind == "call" else {})}
            yield _event("content_block_start", index=block.number, content_block=begun)
        elif step.what == "grown":
            kind, field = _DELTAS[block.kind]
            yield _event("content_block_delta", index=block.number, delta={"type": kind, field: step.text})
        else:
            if block.kind == "reasoning":
                signed = {"type": "signature_delta", "signature": SIGNATURE}
                yield _event("content_block_delta", index=block.number, delta=signed)
            yield _event("content_block_stop", index=block.number)

    def end(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        yield _event("message_delta", delta=self._end_of(answers[0]), usage=self._usage(answers[0]))
        yield _event("message_stop")

    def failed(self, error: dict[str, Any]) -> Event:
        return Event(error, "error")

    def ping(self) -> str:
        return _event("ping").text()


def _event(kind: str, **fields: Any) -> Event:
    return Event({"type": kind, **fields}, kind)


def _content(block: AnswerBlock) -> dict[str, Any]:
    """A block of a whole message. The arguments of a call that was cut off are no JSON: then there are none."""
    if block.kind == "call":
        try:
            arguments = json.loads(block.text)
        except ValueError:
            arguments = {}
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
    return {"type": "text", "text": block.text}
