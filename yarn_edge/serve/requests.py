"""Requests of the OpenAI interface. A field that this server does not support is an error that names the field."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError

# Fields that have no effect here, whatever their value.
_IGNORED = frozenset({
    "model", "user", "store", "metadata", "stream_options", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "best_of", "timeout",
})  # fmt: skip
# Values of other fields that are accepted, because they ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",), "tools": ([],),
    "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "logit_bias": ({},),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "reasoning_effort": (),
}  # fmt: skip
MAX_STOPS, MAX_STOP_CHARS = 16, 256


class Sampled(BaseModel):
    """The fields that both kinds of requests share."""

    model_config = ConfigDict(extra="allow")

    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None

    def sampling(self, usual: Sampling) -> Sampling:
        """`usual`, changed by the request. Raises YarnEdgeError for values that are out of range."""
        names = "temperature top_p top_k min_p repeat_penalty frequency_penalty presence_penalty seed"
        requested = {name: value for name in names.split() if (value := getattr(self, name)) is not None}
        return Sampling(**{**vars(usual), **requested})

    def stops(self) -> list[str]:
        """Texts that end an answer. Raises YarnEdgeError if they are too many or too long."""
        texts = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        if len(texts) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in texts):
            raise YarnEdgeError(f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters are allowed")
        return texts

    def check(self) -> None:
        """Raise YarnEdgeError for a field that asks for something that is not supported."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _IGNORED or value in _NEUTRAL.get(name, ()):
                continue
            raise YarnEdgeError(f"{name} is not supported by this server")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class Part(BaseModel):
    """A part of a message's content."""

    type: str
    text: str = ""


class ChatMessage(BaseModel):
    """Role and text; other fields (names, old reasoning) are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None

    def text(self) -> str:
        """The content. Raises YarnEdgeError for images and audio."""
        if not isinstance(self.content, list):
            return self.content or ""
        for part in self.content:
            if part.type != "text":
                raise YarnEdgeError(f"messages: content of type {part.type!r} is not supported, only text")
        return "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def as_messages(self) -> list[dict[str, str]]:
        """The messages for a chat template."""
        roles = {"developer": "system"}
        return [{"role": roles.get(m.role, m.role), "content": m.text()} for m in self.messages]

    @property
    def most_tokens(self) -> int | None:
        """Maximum length of the answer in tokens; None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]

    def one_prompt(self) -> str | list[int]:
        """The prompt as text or tokens. Raises YarnEdgeError for several prompts."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise YarnEdgeError("prompt: only one prompt per request is supported")
            return prompt[0]
        return prompt  # type: ignore[return-value]


class TokenizeRequest(BaseModel):
    """POST /tokenize: counts the tokens of a text."""

    text: str
