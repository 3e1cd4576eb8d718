"""From the body of a request to the tokens of its prompt, in one of two lanes. What cannot fit into the context is refused early."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from yarn_edge.chat.reasoning import opened_by
from yarn_edge.chat.template import Message, RawText, Renderer
from yarn_edge.chat.tools.forms import ToolForm, tool_form
from yarn_edge.chat.tools.parser import ToolParser
from yarn_edge.engine.constraint import Constraint, json_object_constraint, json_schema_constraint
from yarn_edge.engine.grammar.values import SchemaError
from yarn_edge.engine.sampling import MAX_SEED, Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.serve.lanes import SHORT_BYTES, TextLane
from yarn_edge.serve.question import Question
from yarn_edge.serve.refusals import TooLongError
from yarn_edge.serve.requests import Sampled, TokenizeRequest, parsed
from yarn_edge.serve.surfaces.embeddings import EmbeddingsRequest
from yarn_edge.serve.worker import Asked

WORK_S = 20.0  # for the text of one request
MOST_COUNTED = 1 << 20  # tokens, for /tokenize
_ESCAPED = 6  # bytes of JSON for one of the text, at most: \u0061
_OTHER_BYTES = 1 << 20  # for everything but the texts
_TEXTS = ("content", "reasoning_content", "tool_calls")  # of a message
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

    async def prepared(self, body: bytes, kind: type[Sampled], usual: Sampling) -> Prepared:
        """A request that is ready to be answered. Raises YarnEdgeError, also what the template says."""

        def work(renderer: Renderer | None) -> Prepared:
            request, question, tokens = self._read(body, kind, usual, renderer, self.n_ctx)
            return self._prepared(request, question, self._fitting(tokens))

        self._check("bytes of JSON", len(body), self._most_json)
        return await self._in_lane(body, work)

    async def counted(self, body: bytes, kind: type[Sampled], usual: Sampling) -> int:
        """The length in tokens of a request's prompt. Raises TooLongError if there are too many to count."""
        most = max(self.n_ctx, MOST_COUNTED)

        def work(renderer: Renderer | None) -> int:
            return len(self._read(body, kind, usual, renderer, most)[2])

        return self._countable(await self._in_lane(body, work), most)

    def _read(
        self, body: bytes, kind: type[Sampled], usual: Sampling, renderer: Renderer | None, at_most: int
    ) -> tuple[Sampled, Question, list[int]]:
        """A request, what it asks, and the tokens of its prompt."""
        request = parsed(kind, body)
        self._check("messages", len(request.items), self.n_ctx)
        self._check("parts of messages", sum(map(n_parts, request.items)), self.n_ctx)
        question = request.question(usual)
        if isinstance(question.prompt, str):
            self._check("characters", len(question.prompt), self._most_bytes)
            message: Message = {"role": "user", "content": question.prompt}
            return request, question, RawText().tokens(self.model, [message], at_most, _deadline())
        if question.prompt is not None:
            return request, question, self._known(question.prompt, "prompt")
        if renderer is None:
            raise YarnEdgeError("the model has no chat template (a base model?): use /v1/completions")
        said = [[message.get(name) for name in _TEXTS] for message in question.messages]
        self._check("characters", n_characters([said, question.tools.usable]), self._most_bytes)
        options = self._options(question)
        tools = question.tools.usable
        tokens = renderer.tokens(self.model, question.messages, at_most, _deadline(), tools=tools, options=options)
        return request, question, tokens

    def _options(self, question: Question) -> dict[str, Any]:
        """What the chat template is told, which refuses variables that it does not read."""
        template = self.model.chat_template or ""
        hints = {name: value for name, value in question.hints.items() if name in template}
        variables = {**hints, **question.options}
        return {
            **({"chat_template_kwargs": variables} if variables else {}),
            **({"continue_final_message": True} if question.continues else {}),
        }

    def _prepared(self, request: Sampled, question: Question, tokens: list[int]) -> Prepared:
        """The work for the model: the answers, what they must be like, and what finds the calls in them."""
        self._known([token for token, _bias in question.sampling.logit_bias], "logit_bias")
        tools = question.tools.usable
        form = tool_form(self.model.chat_template)
        reads = question.prompt is None and (bool(tools) or form.channels)
        constraint = self._constraint(question, form, opened_by(self.model, tokens))
        names = {*(form.visible if reads else ()), *(constraint.visible if constraint else ())}
        asked = Asked(
            tokens,
            replace(question.sampling, constraint=constraint),
            question.max_tokens,
            question.stops,
            reasons=question.prompt is None,
            cache_key=question.cache_key,
            top_logprobs=question.top_logprobs,
            visible=self._tokens_named(names),
        )
        each = [replace(asked, sampling=sampling) for sampling in seeds(asked.sampling, question.n)]
        return Prepared(request, question, each, partial(form.parser, tools) if reads else None)

    def _constraint(self, question: Question, form: ToolForm, opened: str | None) -> Constraint | None:
        """What the answer must be like. opened: the tag that ends the thoughts which the prompt has begun."""
        if question.form is not None:
            try:
                schema = question.form.schema
                return json_schema_constraint(schema, after=opened) if schema else json_object_constraint(after=opened)
            except SchemaError as error:
                raise YarnEdgeError(f"{question.form.field}{'.' if error.at else ''}{error.at}: {error.fact}") from None
        tools = question.tools
        if not tools.usable:
            return None
        named = {"type": "function", "function": {"name": tools.function}}
        choice = named if tools.function else tools.choice
        return form.constraint(tools.usable, choice, opened=opened, several=tools.parallel)

    def _tokens_named(self, names: Collection[str]) -> frozenset[int]:
        found = (self.model.tokenize(name, add_special=False, parse_special=True) for name in names)
        return frozenset(ids[0] for ids in found if len(ids) == 1)

    async def count(self, body: bytes) -> int:
        """The number of tokens of a text. Raises TooLongError if there are too many to count."""
        most = max(self.n_ctx, MOST_COUNTED)

        def work(_renderer: Renderer | None) -> int:
            text = parsed(TokenizeRequest, body).text
            ids = self.model.tokenize(text, add_special=False, parse_special=False, at_most=most, until=_deadline())
            return len(ids)

        return self._countable(await self._in_lane(body, work), most)

    def _countable(self, counted: int, most: int) -> int:
        if counted > most:
            raise TooLongError(f"the text has over {most} tokens, the context holds {self.n_ctx}")
        return counted

    async def embedded(self, body: bytes) -> tuple[EmbeddingsRequest, list[list[int]]]:
        """A request for vectors, and the tokens of its texts, with what the model puts around a text. Raises YarnEdgeError."""

        def tokens_of(text: str | list[int]) -> list[int]:
            if isinstance(text, str):
                self._check("characters", len(text), self._most_bytes)
                return self.model.tokenize(
                    text, add_special=True, parse_special=False, at_most=self.n_ctx, until=_deadline()
                )
            return self._known(text, "input")

        def work(_renderer: Renderer | None) -> tuple[EmbeddingsRequest, list[list[int]]]:
            request = parsed(EmbeddingsRequest, body)
            return request, [tokens_of(text) for text in request.inputs()]

        return await self._in_lane(body, work)

    def _known(self, tokens: Sequence[int], field: str) -> list[int]:
        if any(not 0 <= token < self.model.n_vocab for token in tokens):
            raise YarnEdgeError(f"{field}: tokens are from 0 to {self.model.n_vocab - 1}")
        return list(tokens)

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


@dataclass(frozen=True)
class Prepared:
    """A request that is ready: asked, once for each answer; parser: makes what finds the calls in an answer, None if there are no tools."""

    request: Sampled
    question: Question
    asked: list[Asked]
    parser: Callable[[], ToolParser] | None


def _deadline() -> float:
    return time.monotonic() + WORK_S


def seeds(sampling: Sampling, n: int) -> list[Sampling]:
    """For each of n answers: with a seed, the next one each time."""
    if sampling.seed is None:
        return [sampling] * n
    return [replace(sampling, seed=(sampling.seed + number) % (MAX_SEED + 1)) for number in range(n)]


def n_parts(item: Any) -> int:
    """The number of parts that a message is given in."""
    contents = (item.get("content"), item.get("output")) if isinstance(item, dict) else ()
    return max(1, *(len(content) for content in contents if isinstance(content, list)), 0)


def n_characters(value: Any) -> int:
    """The length of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(name) + n_characters(held) for name, held in value.items())
    return sum(map(n_characters, value)) if isinstance(value, Sequence) else 0
