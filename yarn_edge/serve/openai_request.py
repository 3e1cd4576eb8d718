"""What OpenAI's two older interfaces share, chat and completions: fields of requests, and what is around the choices of an answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from pydantic import Field

from yarn_edge.engine.sampling import Sampling
from yarn_edge.serve.blocks import AnswerBlocks
from yarn_edge.serve.fields import Accepted, refuse_unknown
from yarn_edge.serve.requests import MOST_ANSWERS, Sampled, stop_texts
from yarn_edge.serve.writing import Event, Writer

_STREAM_OPTIONS: Accepted = {
    "include_usage": (True, False),
    "include_obfuscation": (True, False),
    "continuous_usage_stats": (False,),
}


class OpenAIRequest(Sampled):
    """A request of the chat or the completions interface."""

    stream_options: dict[str, Any] | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Any = None
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS)

    def check(self) -> None:
        super().check()
        refuse_unknown(self.stream_options or {}, _STREAM_OPTIONS, "stream_options.")

    def shared(self, usual: Sampling) -> dict[str, Any]:
        """The fields of a question that both have."""
        return {
            "sampling": self.sampling(usual),
            "stops": stop_texts(self.stop, "stop"),
            "n": self.n or 1,
            "stream": self.stream,
            "counts_usage": bool((self.stream_options or {}).get("include_usage")),
            "cache_key": self.cache_key,
        }


class OpenAIWriter(Writer):
    """A response of choices, or its chunks. prefix: of its id; kinds: what a whole response is called, and a chunk."""

    prefix: ClassVar[str]
    kinds: ClassVar[tuple[str, str]]

    @abstractmethod
    def choice(self, answer: AnswerBlocks) -> dict[str, Any]:
        """A whole answer."""

    def whole(self, answers: Sequence[AnswerBlocks]) -> dict[str, Any]:
        choices = [self.choice(answer) for answer in answers]
        return self._response(self.kinds[0], choices, usage=_usage(self.head.n_prompt, answers))

    def chunk(self, *choices: dict[str, Any], **more: Any) -> Event:
        """A part of a stream."""
        return Event(self._response(self.kinds[1], choices, **more))

    def end(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        if self.head.question.counts_usage:
            yield self.chunk(usage=_usage(self.head.n_prompt, answers))
        yield Event("[DONE]")

    def _response(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = self.head
        about = {"id": f"{self.prefix}-{head.number}", "created": head.created, "model": head.model, "object": kind}
        return {**about, "choices": choices, **more}


def _usage(n_prompt: int, answers: Sequence[AnswerBlocks]) -> dict[str, Any]:
    """Token counts under OpenAI's names, and our timings. Cached tokens only as far as the client itself had them evaluated: others
    could find out from them what somebody asked.
    """
    generated = sum(answer.generated for answer in answers)
    first = answers[0]
    counts = {"prompt_tokens": n_prompt, "completion_tokens": generated, "total_tokens": n_prompt + generated}
    timings = {} if first.stats is None else {"ttft_s": first.stats.ttft_s, "tok_per_s": first.stats.tok_per_s}
    cached = {} if first.cached is None else {"prompt_tokens_details": {"cached_tokens": first.cached}}
    return {**counts, **cached, **timings}
