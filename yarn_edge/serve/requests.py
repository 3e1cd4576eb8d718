"""Requests of the OpenAI interface. A field that asks for what this server does not do is an error that names the field."""

from __future__ import annotations

import gc
from dataclasses import fields
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from yarn_edge.chat.template import Message
from yarn_edge.engine.sampling import MAX_SEED, Sampling, SamplingError
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import Accepted, brief, complaint, refuse_unknown
from yarn_edge.serve.messages import chat_message

# Fields that change nothing in an answer, whatever their value.
_WITHOUT_EFFECT = frozenset({
    "model", "user", "metadata", "safety_identifier", "prompt_cache_retention", "parallel_tool_calls",
    "timeout",
})  # fmt: skip
# Values of other fields that ask for what happens anyway.
_AS_IT_IS: Accepted = {
    "n": (1,), "best_of": (1,), "logprobs": (False,), "top_logprobs": (0,), "echo": (False,), "store": (False,),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "service_tier": ("auto", "default"), "verbosity": ("medium",),
    # of llama-server and vLLM
    "cache_prompt": (True,), "add_generation_prompt": (True,), "continue_final_message": (False,), "ignore_eos": (False,),
    "repetition_penalty": (1,), "typical_p": (1,), "min_tokens": (0,), "mirostat": (0,),
}  # fmt: skip
_STREAM_OPTIONS: Accepted = {
    "include_usage": (True, False),
    "include_obfuscation": (True, False),
    "continuous_usage_stats": (False,),
}
_SAMPLING = tuple(field.name for field in fields(Sampling))
MAX_STOPS, MAX_STOP_CHARS = 16, 256
_BOM = b"\xef\xbb\xbf"
R = TypeVar("R", bound="CheckedRequest")


def parsed(kind: type[R], body: bytes) -> R:
    """A request from the JSON of its body. Raises YarnEdgeError that names what is wrong with it."""
    if not body.strip():
        raise YarnEdgeError("the request must be a JSON object")
    values = _json(body.removeprefix(_BOM))
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise YarnEdgeError(complaint(error.errors(include_url=False, include_input=False))) from None
    request.check()
    return request


def _json(body: bytes) -> Any:
    """The value of UTF-8 JSON: no NaN, no lone surrogates, at most 200 levels deep."""
    collects = gc.isenabled()
    gc.disable()  # it would look again and again at millions of lists, of which none can be garbage
    try:
        return from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise YarnEdgeError(f"the request is not valid JSON: {error}") from None
    finally:
        if collects:
            gc.enable()


class CheckedRequest(BaseModel):
    """A request whose further fields are checked, not ignored."""

    model_config = ConfigDict(extra="allow")

    def check(self) -> None:
        """Raise YarnEdgeError for a field that asks for something that is not done."""
        extra = self.model_extra or {}
        refuse_unknown({name: value for name, value in extra.items() if name not in _WITHOUT_EFFECT}, _AS_IT_IS)


class Sampled(CheckedRequest):
    """The fields that both kinds of requests for an answer share. seed: any 64 bits, reduced to those of llama.cpp; -1 for a new one."""

    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=2**63)
    min_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Any = None
    prompt_cache_key: Any = None

    def check(self) -> None:
        super().check()
        refuse_unknown(self.stream_options or {}, _STREAM_OPTIONS, "stream_options.")

    def sampling(self, usual: Sampling) -> Sampling:
        """`usual`, changed by the request. Raises YarnEdgeError, which names the field, for values that are out of range."""
        wanted = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.top_k == -1:
            wanted["top_k"] = 0  # all tokens
        if self.seed is not None:
            wanted["seed"] = None if self.seed == -1 else self.seed % (MAX_SEED + 1)
        try:
            return Sampling(**{**vars(usual), **wanted})
        except SamplingError as error:
            raise YarnEdgeError(f"{error.field} {error.fact}") from error

    def stops(self) -> list[str]:
        """Texts that end an answer. Raises YarnEdgeError if they are too many or too long, or no texts."""
        texts = [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts[: MAX_STOPS + 1]):
            raise YarnEdgeError(f"stop is {brief(self.stop)}, but must be a text or a list of texts")
        if len(texts) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in texts):
            raise YarnEdgeError(f"stop: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters are allowed")
        return texts

    @property
    def most_tokens(self) -> int | None:
        """Maximum length of the answer in tokens; None for as many as fit."""
        return self.max_tokens

    @property
    def cache_key(self) -> str:
        """The client's name for its part of the cache; "" for none."""
        return self.prompt_cache_key if isinstance(self.prompt_cache_key, str) else ""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool((self.stream_options or {}).get("include_usage"))


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    def check(self) -> None:
        super().check()
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise YarnEdgeError("max_tokens and max_completion_tokens differ: leave out one of them")

    @property
    def n_parts(self) -> int:
        """The number of parts that the contents of messages are given in."""
        contents = (message.get("content") for message in self.messages if isinstance(message, dict))
        return sum(len(content) if isinstance(content, list) else 1 for content in contents)

    def as_messages(self) -> list[Message]:
        """The messages for a chat template. Raises YarnEdgeError that names the field of what is not text."""
        return [chat_message(message, f"messages[{number}]") for number, message in enumerate(self.messages)]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: Any

    def one_prompt(self) -> str | list[int]:
        """The prompt as text or tokens. Raises YarnEdgeError for several prompts, and for what is neither."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise YarnEdgeError("prompt: only one prompt per request is supported")
            prompt = prompt[0]
        if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
            return prompt
        raise YarnEdgeError(f"prompt is {brief(prompt)}, but must be a text or a list of tokens")


class TokenizeRequest(CheckedRequest):
    """POST /tokenize: counts the tokens of a text."""

    text: str
