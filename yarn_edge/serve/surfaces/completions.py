"""POST /v1/completions: a text is continued as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from yarn_edge.engine.chances import TokenChance
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.serve.blocks import AnswerBlocks, AnswerStep
from yarn_edge.serve.openai_request import OpenAIRequest, OpenAIWriter
from yarn_edge.serve.parts import text_or_tokens
from yarn_edge.serve.question import Question
from yarn_edge.serve.requests import alternatives
from yarn_edge.serve.writing import Event, Head


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions."""

    prompt: Any
    logprobs: Any = None

    def question(self, usual: Sampling) -> Question:
        return Question(
            prompt=self.one_prompt(),
            max_tokens=self.max_tokens,
            top_logprobs=None
            if self.logprobs is None or self.logprobs is False
            else alternatives(self.logprobs, "logprobs"),
            **self.shared(usual),
        )

    def one_prompt(self) -> str | list[int]:
        """The prompt as text or tokens. Raises YarnEdgeError for several prompts, and for what is neither."""
        prompt = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            if len(prompt) > 1:
                raise YarnEdgeError("prompt: only one prompt per request is supported")
            prompt = prompt[0]
        return text_or_tokens(prompt, "prompt")


class CompletionWriter(OpenAIWriter):
    """A text completion, or its chunks."""

    prefix, kinds = "cmpl", ("text_completion", "text_completion")

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self._offsets: dict[int, int] = {}  # characters of each answer that chunks have told of

    def choice(self, answer: AnswerBlocks) -> dict[str, Any]:
        tokens = [token for block in answer.blocks for token in block.tokens]
        return self._choice(answer, answer.text("answer"), tokens, answer.reason)

    def step(self, step: AnswerStep) -> Iterator[Event]:
        if step.what == "grown":
            yield self.chunk(self._choice(step.answer, step.text, step.tokens, None))
        elif step.what == "ended":
            yield self.chunk(self._choice(step.answer, "", (), step.answer.reason))

    def _choice(
        self, answer: AnswerBlocks, text: str, tokens: Sequence[TokenChance], reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if self.head.question.top_logprobs is None else self._logprobs(answer.index, tokens)
        return {"index": answer.index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def _logprobs(self, index: int, tokens: Sequence[TokenChance]) -> dict[str, Any]:
        """The older form: lists, and alternatives as an object of their texts."""
        texts, offsets = [self._text(chance.token) for chance in tokens], []
        at = self._offsets.get(index, 0)
        for text in texts:
            offsets.append(at)
            at += len(text)
        self._offsets[index] = at
        return {
            "tokens": texts,
            "token_logprobs": [chance.logprob for chance in tokens],
            "top_logprobs": [{self._text(token): logprob for token, logprob in chance.top} for chance in tokens],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return self.head.token_bytes(token).decode(errors="replace")
