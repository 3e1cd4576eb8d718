"""From the body of a request to the tokens of its prompt, in one of two lanes. What cannot fit into the context is refused early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from yarn_edge.chat.template import Message, RawText, Renderer
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.serve.lanes import SHORT_BYTES, TextLane
from yarn_edge.serve.refusals import TooLongError
from yarn_edge.serve.requests import ChatRequest, CompletionRequest, TokenizeRequest, parsed

WORK_S = 20.0  # for the text of one request
MOST_COUNTED = 1 << 20  # tokens, for /tokenize
_ESCAPED = 6  # bytes of JSON for one of the text, at most: \u0061
_OTHER_BYTES = 1 << 20  # for everything but the texts
T = TypeVar("T")
_REMEDY = "shorten it, or start the server with a larger --ctx (yarn-edge fit shows what fits in memory)"


class Prompts:
    """The texts of requests for one model. n_ctx: tokens that its context holds; lanes: for short requests, for long ones."""

    def __init__(self, model: Model, n_ctx: int, lanes: tuple[TextLane, TextLane]) -> None:
        self.model, self.n_ctx, self.lanes = model, n_ctx, lanes
        names = model.gguf.metadata.get("tokenizer.ggml.tokens") or ()
        longest = max((len(name.encode(errors="surrogatepass")) for name in names), default=1)
        self._most_bytes = n_ctx * longest  # a token stands for no more bytes than its name has
        self._most_json = _ESCAPED * self._most_bytes + _OTHER_BYTES

    async def chat(self, body: bytes) -> tuple[ChatRequest, list[int]]:
        """A request and the tokens of its messages. Raises YarnEdgeError, also what the template says."""

        def work(renderer: Renderer | None) -> tuple[ChatRequest, list[int]]:
            request = parsed(ChatRequest, body)
            self._check("messages", len(request.messages), self.n_ctx)
            self._check("parts of messages", request.n_parts, self.n_ctx)
            messages = request.as_messages()
            if renderer is None:
                raise YarnEdgeError("the model has no chat template (a base model?): use /v1/completions")
            self._check("characters", sum(len(message["content"]) for message in messages), self._most_bytes)
            return request, self._fitting(renderer.tokens(self.model, messages, self.n_ctx, _deadline()))

        self._check("bytes of JSON", len(body), self._most_json)
        return await self._in_lane(body, work)

    async def completion(self, body: bytes) -> tuple[CompletionRequest, list[int]]:
        """A request and the tokens of its prompt, which is continued as it is. Raises YarnEdgeError."""

        def work(_renderer: Renderer | None) -> tuple[CompletionRequest, list[int]]:
            request = parsed(CompletionRequest, body)
            prompt = request.one_prompt()
            if isinstance(prompt, str):
                self._check("characters", len(prompt), self._most_bytes)
                message: Message = {"role": "user", "content": prompt}
                return request, self._fitting(RawText().tokens(self.model, [message], self.n_ctx, _deadline()))
            if any(not 0 <= token < self.model.n_vocab for token in prompt):
                raise YarnEdgeError(f"prompt: tokens are from 0 to {self.model.n_vocab - 1}")
            return request, self._fitting(prompt)

        self._check("bytes of JSON", len(body), self._most_json)
        return await self._in_lane(body, work)

    async def count(self, body: bytes) -> int:
        """The number of tokens of a text. Raises TooLongError if there are too many to count."""
        most = max(self.n_ctx, MOST_COUNTED)

        def work(_renderer: Renderer | None) -> int:
            text = parsed(TokenizeRequest, body).text
            ids = self.model.tokenize(text, add_special=False, parse_special=False, at_most=most, until=_deadline())
            return len(ids)

        counted = await self._in_lane(body, work)
        if counted > most:
            raise TooLongError(f"the text has over {most} tokens, the context holds {self.n_ctx}")
        return counted

    async def _in_lane(self, body: bytes, work: Callable[[Renderer | None], T]) -> T:
        return await self.lanes[len(body) > SHORT_BYTES].run(work)

    def _check(self, what: str, number: int, most: int) -> None:
        if number > most:
            raise TooLongError(
                f"the prompt has {number} {what}, too many for {self.n_ctx} tokens of context: {_REMEDY}"
            )

    def _fitting(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise YarnEdgeError("the prompt is empty")
        if len(tokens) >= self.n_ctx:
            raise TooLongError(
                f"the prompt has at least {len(tokens)} tokens, the context holds {self.n_ctx} with the answer: {_REMEDY}"
            )
        return tokens


def _deadline() -> float:
    return time.monotonic() + WORK_S
