"""A conversation whose engine says what a script has it say, or raises; its tokens are bytes."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

from yarn_edge.engine.answer import AnswerStats
from yarn_edge.engine.generation import Generation
from yarn_edge.runtime.context import Context

N_CTX = 4096


class Bytes:
    """A model whose tokens are bytes. It takes only whole characters."""

    n_ctx_train = N_CTX

    def tokenize(self, text: str, **_kwargs: object) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int, **_kwargs: object) -> bytes:
        return bytes([token])


class Joined:
    """A template that writes the messages one after another."""

    def tokens(self, model: Any, messages: Sequence[Mapping[str, str]], *_args: object, **_kwargs: object) -> list[int]:
        return list(model.tokenize("".join(f"<{m['role']}>{m['content']}" for m in messages)))

    def close(self) -> None:
        pass


class Scripted(Generation):
    """An engine that says what it is told to, in turn. An exception in the script is raised."""

    def __init__(self) -> None:
        made = SimpleNamespace(n_ctx=N_CTX, n_batch=64, model=Bytes())
        self.context, self.stats, self.states = cast(Context, made), None, None
        self.script: list[str | BaseException] = []

    def generate(self, tokens: Sequence[int], *_args: Any, **_kwargs: Any) -> Generator[str, None, None]:
        script, self.script = self.script, []
        try:
            for item in script:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.stats = AnswerStats(len(tokens), 0, 0, len(script), 0.1, 9.5, "stop", 0, 0, len(tokens), N_CTX)

    def preload(self, tokens: Sequence[int]) -> None:
        pass

    def keep_on_disk(self) -> None:
        pass
