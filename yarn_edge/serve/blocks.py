"""An answer in blocks: thoughts, text and calls of functions, one after another, as every interface tells them in its own form."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from yarn_edge.chat.tools.parser import ToolParser
from yarn_edge.chat.tools.said import CallArguments, CallBegun, CallEnded, ReasoningSaid, Said, TextSaid
from yarn_edge.engine.answer import AnswerStats
from yarn_edge.engine.chances import TokenChance
from yarn_edge.serve.worker import AnswerPiece

BlockKind = Literal["reasoning", "answer", "call"]
Reason = Literal["stop", "length", "tool_calls"]


@dataclass
class AnswerBlock:
    """A part of an answer. number: its place; name, id: of a call, whose `text` is its arguments in JSON. tokens: what it is made of."""

    kind: BlockKind
    number: int
    text: str = ""
    id: str = ""
    name: str = ""
    tokens: list[TokenChance] = field(default_factory=list)


@dataclass
class AnswerBlocks:
    """An answer so far. reason: why it ended; stopped_by: the stop text that it was about to say; cached: as in `AnswerPiece`."""

    index: int
    blocks: list[AnswerBlock] = field(default_factory=list)
    reason: Reason = "stop"
    stopped_by: str | None = None
    stats: AnswerStats | None = None
    cached: int | None = None

    def of(self, kind: BlockKind) -> list[AnswerBlock]:
        """The blocks of one kind."""
        return [block for block in self.blocks if block.kind == kind]

    def text(self, kind: BlockKind) -> str:
        """All text of one kind."""
        return "".join(block.text for block in self.of(kind))

    @property
    def generated(self) -> int:
        """The number of its tokens."""
        return 0 if self.stats is None else self.stats.generated_tokens

    @property
    def context_full(self) -> bool:
        """Whether it ended because the context did."""
        return self.stats is not None and self.stats.finish_reason == "context"


@dataclass(frozen=True)
class AnswerStep:
    """Something that happened to an answer: a block begins, grows by a text, or is done; block None: the answer ended."""

    answer: AnswerBlocks
    what: Literal["begun", "grown", "done", "ended"]
    block: AnswerBlock | None = None
    text: str = ""
    tokens: tuple[TokenChance, ...] = ()


class Assembly:
    """Makes an answer of the pieces that the model generates. parser: finds the calls in its text, None if there are none.

    Next to calls, white space is no text of the answer.
    """

    def __init__(self, answer: AnswerBlocks, parser: ToolParser | None) -> None:
        self.answer, self.parser = answer, parser
        self._open: AnswerBlock | None = None
        self._space = ""  # that is text only if more follows
        self._tokens: list[TokenChance] = []  # of text that is held back

    def read(self, piece: AnswerPiece) -> Iterator[AnswerStep]:
        """What a piece does to the answer."""
        self._tokens += piece.tokens
        if piece.kind == "end":
            yield from self._end(piece)
        elif piece.kind == "reasoning":
            yield from self._grow("reasoning", piece.text)
        elif self.parser is None:
            yield from self._grow("answer", piece.text)
        else:
            yield from self._said(self.parser.feed(piece.text))

    def _said(self, parts: list[Said]) -> Iterator[AnswerStep]:
        for part in parts:
            if isinstance(part, (TextSaid, ReasoningSaid)):
                yield from self._grow("answer" if isinstance(part, TextSaid) else "reasoning", part.text)
            elif isinstance(part, CallBegun):
                self._space = ""
                yield from self._begin("call", part.id, part.name)
            elif isinstance(part, CallArguments):
                yield from self._add(part.text)
            elif isinstance(part, CallEnded):
                yield from self._close()

    def _grow(self, kind: BlockKind, text: str) -> Iterator[AnswerStep]:
        same = self._open is not None and self._open.kind == kind
        if kind == "answer" and self.parser is not None:
            text = self._space + text
            kept = text.rstrip() if same or text.strip() else ""
            self._space, text = text[len(kept) :], kept if same else kept.lstrip()
        if not text:
            return
        if not same:
            yield from self._begin(kind)
        yield from self._add(text)

    def _begin(self, kind: BlockKind, call_id: str = "", name: str = "") -> Iterator[AnswerStep]:
        yield from self._close()
        self._open = AnswerBlock(kind, len(self.answer.blocks), id=call_id, name=name)
        self.answer.blocks.append(self._open)
        yield AnswerStep(self.answer, "begun", self._open)

    def _add(self, text: str) -> Iterator[AnswerStep]:
        assert self._open is not None
        tokens, self._tokens = tuple(self._tokens), []
        self._open.text += text
        self._open.tokens += tokens
        yield AnswerStep(self.answer, "grown", self._open, text, tokens)

    def _close(self) -> Iterator[AnswerStep]:
        if self._open is not None:
            block, self._open = self._open, None
            yield AnswerStep(self.answer, "done", block)

    def _end(self, piece: AnswerPiece) -> Iterator[AnswerStep]:
        if self.parser is not None:
            yield from self._said(self.parser.end())
        yield from self._close()
        answer = self.answer
        answer.stats, answer.cached, answer.stopped_by = piece.stats, piece.cached, piece.stopped_by
        called = piece.ended == "stop" and answer.of("call")
        answer.reason = "tool_calls" if called else piece.ended
        yield AnswerStep(answer, "ended")


def new_id(prefix: str) -> str:
    """An id that no other object has."""
    return f"{prefix}_{secrets.token_hex(12)}"


TokenBytes = Callable[[int], bytes]


def said_token(token: int, logprob: float, token_bytes: TokenBytes) -> dict[str, object]:
    """A token with its probability as the chat and the responses interface tell it."""
    data = token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


def said_tokens(
    tokens: list[TokenChance] | tuple[TokenChance, ...], token_bytes: TokenBytes
) -> list[dict[str, object]]:
    """Tokens with their alternatives, in the same form."""
    return [
        {
            **said_token(chance.token, chance.logprob, token_bytes),
            "top_logprobs": [said_token(other, logprob, token_bytes) for other, logprob in chance.top],
        }
        for chance in tokens
    ]
