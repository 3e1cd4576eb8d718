"""What a model says, as the events of a stream."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

_ID_CHARS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class TextSaid:
    """Text of the answer."""

    text: str


@dataclass(frozen=True)
class ReasoningSaid:
    """Text of what precedes the answer, in forms that have a channel for it."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of a function that the request has. index: 0 for the first call of an answer; id: nine letters and digits."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of the call's arguments, which are JSON unless the model broke off or erred."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnded:
    """The end of a call, also of one that was cut."""

    index: int


Said = TextSaid | ReasoningSaid | CallBegun | CallArguments | CallEnded


def new_call_id() -> str:
    """Nine letters and digits, which Mistral's templates ask for."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))
