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

TOKENS = [i % 200 for i in range(64)]
_SETTINGS = ContextSettings(n_ctx=256, n_batch=32, threads=1)


class Caches:
    """A state of a tiny model with changed bytes, or no file at all. What is restored must be what was kept."""

    name, in_process = "saved states", False

    def __init__(self, model: Path, scratch: Path) -> None:
        self.path = model
        with Model(model) as loaded, Context(loaded, _SETTINGS) as context:
            context.evaluate(TOKENS, 0)
            StateCache(scratch / "whole").keep(context, run_key(context), TOKENS, len(TOKENS))
        (whole,) = (scratch / "whole").glob("*.state")
        self.name_of_state, self.data = whole.name, whole.read_bytes()
        self._opened: tuple[Model, Context] | None = None

    def case(self, rng: random.Random, scratch: Path) -> Case:
        if self._opened is None:  # in this process: contexts do not survive a fork
            model = Model(self.path)
            self._opened = model, Context(model, _SETTINGS)
        context, folder = self._opened[1], scratch / "states"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        size = self._plant(rng, folder / self.name_of_state)

        def restore() -> str:
            states = StateCache(folder)
            entry = states.find(run_key(context), TOKENS, context.n_batch, context.n_ctx)
            if entry is None:
                return "not used"
            assert entry.tokens.tolist()[: entry.usable] == TOKENS[: entry.usable], "other tokens were restored"
            return "restored" if states.load(context, entry) else "damaged"

        return Case(size, restore)

    def _plant(self, rng: random.Random, path: Path) -> int:
        kind = rng.random()
        if kind < 0.9:
            data = mutate_bytes(rng, self.data, len(self.data)) if kind < 0.8 else self.data
            path.write_bytes(data[-rng.randrange(1, len(data)) :] if kind > 0.85 else data)
            return len(self.data)
        with suppress(OSError):
            if kind < 0.93:
                os.mkfifo(path)
            elif kind < 0.96:
                path.symlink_to(rng.choice(("/dev/zero", "/dev/null", path.name, "/dev/stdin", "/proc/self/mem")))
            else:
                with path.open("wb") as file:
                    file.truncate(1 << rng.randrange(10, 40))
        return 0
