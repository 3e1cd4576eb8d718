"""How an interface writes its answers: whole, or in server-sent events."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from yarn_edge.serve.blocks import AnswerBlock, AnswerBlocks, AnswerStep, TokenBytes, new_id
from yarn_edge.serve.question import Question
from yarn_edge.serve.refusals import ErrorForm
from yarn_edge.serve.requests import Sampled


@dataclass(frozen=True)
class Event:
    """A server-sent event. data: an object, or a text as it is; name: None for an event without one."""

    data: dict[str, Any] | str
    name: str | None = None

    def text(self) -> str:
        """As it is sent."""
        data = self.data if isinstance(self.data, str) else json.dumps(self.data, ensure_ascii=False)
        return ("" if self.name is None else f"event: {self.name}\n") + f"data: {data}\n\n"


@dataclass(frozen=True)
class Head:
    """What all parts of a response share. request: as it was asked; n_prompt: the prompt's length in tokens.

    token_bytes: the bytes of a token.
    """

    model: str
    request: Sampled
    question: Question
    n_prompt: int
    token_bytes: TokenBytes
    number: str = field(default_factory=lambda: new_id("")[1:])
    created: int = field(default_factory=lambda: int(time.time()))


class Writer(ABC):
    """Writes the answers to one request."""

    def __init__(self, head: Head) -> None:
        self.head = head

    @abstractmethod
    def whole(self, answers: Sequence[AnswerBlocks]) -> dict[str, Any]:
        """The response without a stream."""

    def begin(self, _answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        """What a stream begins with."""
        yield from ()

    @abstractmethod
    def step(self, step: AnswerStep) -> Iterator[Event]:
        """What a step of an answer is in a stream."""

    def end(self, _answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        """What a stream ends with."""
        yield from ()

    def failed(self, error: dict[str, Any]) -> Event:
        """What a stream ends with instead. error: in the form of this interface's errors."""
        return Event(error)

    def ping(self) -> str:
        """Says that the stream is alive, as it is sent."""
        return ": still here\n\n"


@dataclass(frozen=True)
class Interface:
    """request: what is asked, read from JSON; writer: of the answers; error: how its clients read errors."""

    request: type[Sampled]
    writer: type[Writer]
    error: ErrorForm


def reasoning_tokens(blocks: Sequence[AnswerBlock], total: int) -> int:
    """The share of an answer's tokens that are thoughts, by its share of the text."""
    thoughts = sum(len(block.text) for block in blocks if block.kind == "reasoning")
    characters = sum(len(block.text) for block in blocks)
    return round(total * thoughts / characters) if characters else 0
