"""Requests in JSON. A field that asks for what this server does not do is an error that names the field."""

from __future__ import annotations

import gc
from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from yarn_edge.engine.sampling import MAX_SEED, Sampling, SamplingError
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.fields import Accepted, brief, complaint, refuse_unknown
from yarn_edge.serve.question import Question

# Fields of any interface that change nothing in an answer, whatever their value.
_WITHOUT_EFFECT = frozenset({
    "model", "user", "metadata", "safety_identifier", "prompt_cache_retention", "prompt_cache_options", "timeout", "cache_control",
})  # fmt: skip
# Values of other fields that ask for what happens anyway.
_AS_IT_IS: Accepted = {
    "best_of": (1,), "echo": (False,), "store": (False,), "function_call": ("none", "auto"), "modalities": (["text"],),
    "service_tier": ("auto", "default", "standard_only"), "verbosity": ("medium",), "background": (False,), "truncation": ("disabled",),
    "inference_geo": ("not_available",), "speed": ("standard",),
    # of llama-server and vLLM
    "cache_prompt": (True,), "ignore_eos": (False,), "repetition_penalty": (1,), "typical_p": (1,), "min_tokens": (0,), "mirostat": (0,),
}  # fmt: skip
_SAMPLING = tuple(
    "temperature top_k top_p min_p repeat_penalty seed frequency_penalty presence_penalty".split()  # noqa: SIM905
)
MAX_STOPS, MAX_STOP_CHARS, MAX_BIASES, MAX_BIAS = 16, 256, 1024, 100.0
MOST_LOGPROBS, MOST_ANSWERS = 20, 16
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
    """A request whose further fields are checked, not ignored. as_it_is: what an interface has beyond the rows of this module."""

    model_config = ConfigDict(extra="allow")
    as_it_is: ClassVar[Accepted] = {}

    def check(self) -> None:
        """Raise YarnEdgeError for a field that asks for something that is not done."""
        refuse_unknown(self.model_extra or {}, {**_AS_IT_IS, **self.as_it_is}, read=_WITHOUT_EFFECT)


class Sampled(CheckedRequest):
    """The fields that all requests for an answer share. seed: any 64 bits, reduced to those of llama.cpp; -1 for a new one."""

    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=2**63)
    min_p: float | None = None
    repeat_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    logit_bias: Any = None
    prompt_cache_key: Any = None

    @abstractmethod
    def question(self, usual: Sampling) -> Question:
        """What is asked. usual: sampling where the request says nothing of it. Raises YarnEdgeError that names the field."""

    @property
    def items(self) -> list[Any]:
        """Its messages, as far as it has some, for a check of their number."""
        return []

    def sampling(self, usual: Sampling) -> Sampling:
        """`usual`, changed by the request. Raises YarnEdgeError, which names the field, for values that are out of range."""
        wanted = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        if self.top_k == -1:
            wanted["top_k"] = 0  # all tokens
        if self.seed is not None:
            wanted["seed"] = None if self.seed == -1 else self.seed % (MAX_SEED + 1)
        if self.logit_bias:
            wanted["logit_bias"] = biases(self.logit_bias)
        try:
            return Sampling(**{**vars(usual), **wanted})
        except SamplingError as error:
            raise YarnEdgeError(f"{error.field} {error.fact}") from error

    @property
    def cache_key(self) -> str:
        """The client's name for its part of the cache; "" for none."""
        return self.prompt_cache_key if isinstance(self.prompt_cache_key, str) else ""


class TokenizeRequest(CheckedRequest):
    """POST /tokenize: counts the tokens of a text."""

    text: str


def stop_texts(given: Any, field: str) -> tuple[str, ...]:
    """Texts that end an answer. Raises YarnEdgeError if they are too many or too long, or no texts."""
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or any(not isinstance(text, str) for text in texts[: MAX_STOPS + 1]):
        raise YarnEdgeError(f"{field} is {brief(given)}, but must be a text or a list of texts")
    if len(texts) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in texts):
        raise YarnEdgeError(f"{field}: at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters are allowed")
    return tuple(texts)


def biases(given: Any) -> tuple[tuple[int, float], ...]:
    """logit_bias as (token, what is added to its logit). Raises YarnEdgeError."""
    if not isinstance(given, dict):
        raise YarnEdgeError(f"logit_bias is {brief(given)}, but must be an object of token ids and numbers")
    if len(given) > MAX_BIASES:
        raise YarnEdgeError(f"logit_bias: {len(given)} tokens were given, at most {MAX_BIASES} are allowed")
    found = []
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise YarnEdgeError(f"logit_bias: {brief(token)} is not a token id")
        if not isinstance(bias, (int, float)) or isinstance(bias, bool) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise YarnEdgeError(
                f"logit_bias.{token} is {brief(bias)}, but must be a number from -{MAX_BIAS:g} to {MAX_BIAS:g}"
            )
        found.append((int(token), float(bias)))
    return tuple(found)


def alternatives(given: Any, field: str) -> int:
    """A number of most probable tokens. Raises YarnEdgeError if it is none, or too large."""
    if type(given) is not int or not 0 <= given <= MOST_LOGPROBS:
        raise YarnEdgeError(f"{field} is {brief(given)}, but must be a whole number from 0 to {MOST_LOGPROBS}")
    return given
