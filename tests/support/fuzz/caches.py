"""Damaged and planted files in the folder of saved states."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

from yarn_edge.engine.state_cache import StateCache, run_key
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support.fuzz.mutations import mutate_bytes
from support.fuzz.runner import Case

N_TOKENS = 64


class Caches:
    """A state of a tiny model with changed bytes, or something that is no file. What is restored must be the tokens that were kept."""

    name, in_process = "saved states", False

    def __init__(self, model: Path, scratch: Path) -> None:
        self.path, self.tokens = model, [i % 50 for i in range(N_TOKENS)]
        with self._open() as (_model, context):
            context.evaluate(self.tokens)
            cache = StateCache(scratch / "whole")
            cache.keep(context, run_key(context), self.tokens, N_TOKENS)
            (self.whole,) = (scratch / "whole").glob("*.state")
        self.data = self.whole.read_bytes()
        self._opened: tuple[Model, Context] | None = None
