"""A question, whichever interface it came by: a conversation with tools, or a text to continue, and how it is to be answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from yarn_edge.chat.template import Message
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import brief

Choice = Literal["auto", "none", "required"]


@dataclass(frozen=True)
class Tools:
    """offered: functions, as Hugging Face's templates read them. choice: whether the model may, must not or must call one.

    function: the only one that it may call, "" for any. parallel: whether an answer may have several calls.
    """

    offered: tuple[dict[str, Any], ...] = ()
    choice: Choice = "auto"
    function: str = ""
    parallel: bool = True

    def __post_init__(self) -> None:
        """Raise YarnEdgeError for a choice among tools that are not there."""
        names = [tool["function"]["name"] for tool in self.offered]
        if len(set(names)) < len(names):
            raise YarnEdgeError("tools: two have the same name")
        if self.function and self.function not in names:
            raise YarnEdgeError(f"tool_choice: there is no tool {brief(self.function)}")
        if self.choice == "required" and not names:
            raise YarnEdgeError("tool_choice: a call is required, but there are no tools")

    @property
    def usable(self) -> tuple[dict[str, Any], ...]:
        """What the model is shown: without the tools that it must not call."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.offered if self.function in ("", tool["function"]["name"]))


NO_TOOLS = Tools()


@dataclass(frozen=True)
class JsonForm:
    """JSON that an answer must be. schema: {} for any object; field: that of the request which holds it."""

    schema: dict[str, Any]
    field: str


@dataclass(frozen=True)
class Question:
    """What is asked.

    messages: the conversation; prompt: instead of it, a text or tokens to continue as they are. form: of an answer in
    JSON, None for text. options: for the chat template, by the request's names of them; hints: the same, but it
    does not matter whether the template reads them. continues: whether the answer goes on with the last message. n: number of answers.
    top_logprobs: alternatives to each token whose probabilities are told; None for no probabilities. counts_usage: whether a stream
    ends with the token counts.
    """

    messages: Sequence[Message] = ()
    prompt: str | Sequence[int] | None = None
    tools: Tools = NO_TOOLS
    form: JsonForm | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stops: Sequence[str] = ()
    n: int = 1
    top_logprobs: int | None = None
    stream: bool = False
    counts_usage: bool = False
    cache_key: str = ""

    def __post_init__(self) -> None:
        """Raise YarnEdgeError for what does not go together."""
        if self.form is not None and self.tools.usable:
            raise YarnEdgeError("tools are not supported together with an answer in JSON: leave out one of them")
        if self.continues and (not self.messages or self.messages[-1]["role"] != "assistant"):
            raise YarnEdgeError("continue_final_message: the last message is not the assistant's")
        if self.continues and self.messages[-1].get("tool_calls"):
            raise YarnEdgeError("the last message calls a tool: an answer cannot continue it")
