"""POST /v1/chat/completions, as OpenAI's clients know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.blocks import AnswerBlocks, AnswerStep, said_tokens
from yarn_edge.serve.fields import Accepted, brief, refuse_unknown
from yarn_edge.serve.openai_request import OpenAIRequest, OpenAIWriter
from yarn_edge.serve.parts import (
    HINTS,
    ToolWords,
    an_object,
    chosen_tools,
    effort_of,
    json_form,
    one_name,
    string,
    text_of,
)
from yarn_edge.serve.question import Question
from yarn_edge.serve.requests import alternatives
from yarn_edge.serve.transcript import Transcript, arguments_of
from yarn_edge.serve.writing import Event

TOOL_WORDS = ToolWords(("function",), "function", "parameters")
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields of messages that are read, by role; "reasoning" is another server's name of "reasoning_content".
_READ = {
    "assistant": ("role", "content", "tool_calls", "reasoning_content", "reasoning", *HINTS),
    "tool": ("role", "content", "tool_call_id", "name", *HINTS),
}
_OTHERS = ("role", "content", *HINTS)
_OF_MESSAGES: Accepted = {"prefix": (False,), "partial": (False,)}


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise YarnEdgeError("max_tokens and max_completion_tokens differ: leave out one of them")
        if self.add_generation_prompt is self.continue_final_message:
            raise YarnEdgeError("add_generation_prompt must be the opposite of continue_final_message: leave it out")
        if self.top_logprobs and not self.logprobs:
            raise YarnEdgeError("top_logprobs needs logprobs: true")

    @property
    def items(self) -> list[Any]:
        return self.messages

    def question(self, usual: Sampling) -> Question:
        return Question(
            messages=self.as_messages(),
            tools=chosen_tools(self.tools, self.tool_choice, self.parallel_tool_calls, TOOL_WORDS),
            form=json_form(self.response_format, "response_format", "json_schema"),
            **self._variables(),
            continues=self.continue_final_message,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=alternatives(self.top_logprobs or 0, "top_logprobs") if self.logprobs else None,
            **self.shared(usual),
        )

    def as_messages(self) -> list[dict[str, Any]]:
        """The messages for a chat template. Raises YarnEdgeError that names the field of what is not text."""
        transcript = Transcript()
        for number, message in enumerate(self.messages):
            _tell(transcript, message, f"messages[{number}]")
        return transcript.messages

    def _variables(self) -> dict[str, Any]:
        """Options and hints for the chat template."""
        effort = effort_of(self.reasoning_effort, "reasoning_effort")
        thinks = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        options = {**(self.chat_template_kwargs or {}), **effort["options"], **thinks}
        return {"options": options, "hints": effort["hints"]}


def _tell(transcript: Transcript, given: Any, where: str) -> None:
    """Add a message to a conversation. where: the message's name in errors. Raises YarnEdgeError for what is not text."""
    if not isinstance(given, dict):
        raise YarnEdgeError(f"{where} is not an object with role and content")
    role = one_name(given.get("role"), ROLES, f"{where}.role")
    refuse_unknown(given, _OF_MESSAGES, f"{where}.", _READ.get(role, _OTHERS))
    content = given.get("content")
    if role == "tool":
        transcript.result(
            string(given, "tool_call_id", where), text_of(content, f"{where}.content"), f"{where}.tool_call_id"
        )
        return
    if role == "assistant":
        transcript.new_turn()
        thoughts = given.get("reasoning_content") or given.get("reasoning")
        if isinstance(thoughts, str):
            transcript.think(thoughts)
        content = "" if content in (None, []) else content  # it said nothing, or only thought, or called
    transcript.say(role, text_of(content, f"{where}.content"))
    calls = given.get("tool_calls") or []
    if not isinstance(calls, list):
        raise YarnEdgeError(f"{where}.tool_calls is {brief(calls)}, but must be a list")
    for number, call in enumerate(calls):
        _call(transcript, call, f"{where}.tool_calls[{number}]")


def _call(transcript: Transcript, given: Any, where: str) -> None:
    call = an_object(given, where)
    if call.get("type", "function") != "function":
        raise YarnEdgeError(f"{where}.type is {brief(call.get('type'))}, but only calls of functions are supported")
    function = an_object(call.get("function"), f"{where}.function")
    name = string(function, "name", f"{where}.function")
    arguments = arguments_of(function.get("arguments"), f"{where}.function.arguments")
    refuse_unknown(call, {}, f"{where}.", ("id", "type", "function", "index"))
    transcript.call(string(call, "id", where), name, arguments)


class ChatWriter(OpenAIWriter):
    """A chat completion, or its chunks."""

    prefix, kinds = "chatcmpl", ("chat.completion", "chat.completion.chunk")

    def choice(self, answer: AnswerBlocks) -> dict[str, Any]:
        calls = [
            {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
            for block in answer.of("call")
        ]
        text, thoughts = answer.text("answer"), answer.text("reasoning")
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text else text}
        if thoughts:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = calls
        tokens = [token for block in answer.of("answer") for token in block.tokens]
        return {
            "index": answer.index,
            "message": message,
            "finish_reason": answer.reason,
            "logprobs": self._logprobs(tokens),
        }

    def _logprobs(self, tokens: Any) -> dict[str, Any] | None:
        if self.head.question.top_logprobs is None:
            return None
        return {"content": said_tokens(tokens, self.head.token_bytes), "refusal": None}

    def begin(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        for answer in answers:
            yield self._chunk(answer, {"role": "assistant", "content": ""})

    def step(self, step: AnswerStep) -> Iterator[Event]:
        answer, block = step.answer, step.block
        if block is None:
            yield self._chunk(answer, {}, answer.reason)
        elif block.kind == "call" and step.what != "done":
            call: dict[str, Any] = {"index": answer.of("call").index(block), "function": {"arguments": step.text}}
            if step.what == "begun":
                call |= {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": ""}}
            yield self._chunk(answer, {"tool_calls": [call]})
        elif step.what == "grown":
            name = {"answer": "content", "reasoning": "reasoning_content"}[block.kind]
            logprobs = self._logprobs(step.tokens) if block.kind == "answer" else None
            yield self._chunk(answer, {name: step.text}, None, logprobs)

    def _chunk(
        self, answer: AnswerBlocks, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None
    ) -> Event:
        choice: dict[str, Any] = {"index": answer.index, "delta": delta, "finish_reason": reason}
        if logprobs is not None:
            choice["logprobs"] = logprobs
        return self.chunk(choice)
