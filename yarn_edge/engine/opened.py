"""A model ready to answer: placed and loaded, with a context, states on disk, drafts, and the requested scaling.

`chat` and `serve` share this. Every choice that is made here rather than by the user is reported in a note.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from yarn_edge.engine.generation import Generation
from yarn_edge.engine.prompt_lookup import Lookup, PromptLookup
from yarn_edge.engine.state_cache import MAX_BYTES, StateCache
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.declared import wanted as wanted_scaling
from yarn_edge.llama_rules.effective import RuntimeArguments, angle_error, effective
from yarn_edge.llama_rules.rescale import base_scaling, in_memory, with_factor
from yarn_edge.memory.placement import Placement, Wanted, place
from yarn_edge.progress import note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.model import Model

_SCALINGS = {"yarn": "YaRN", "linear": "linear scaling", "ntk": "NTK-aware scaling", "ntk-by-parts": "NTK-by-parts"}


@dataclass(frozen=True)
class EngineSettings:
    """cache: the folder of saved states, or None. yarn_factor: None for the file's own scaling."""

    cache: Path | None = None
    cache_bytes: int = MAX_BYTES
    lookup: Lookup = "auto"
    yarn_factor: float | Literal["auto"] | None = None


@contextmanager
def opened(path: Path, wanted: Wanted, settings: EngineSettings) -> Iterator[Generation]:
    """The loaded model, open until the block ends. Raises YarnEdgeError."""
    states = None if settings.cache is None else StateCache(settings.cache, settings.cache_bytes)
    placed = place(path, wanted)
    arguments, overrides, holds = _scaling(path, settings.yarn_factor, placed.choice.n_ctx)
    with (
        Model(path, device=placed.device, overrides=overrides) as model,
        Context(model, replace(placed.choice.settings, arguments=arguments)) as context,
    ):
        _say(placed, wanted, context, holds or model.n_ctx_train)
        lookup = None if settings.lookup == "off" else PromptLookup(always=settings.lookup == "on")
        yield Generation(context, states, lookup)


def user_cache_folder() -> Path:
    """This system's folder for files that programs can rebuild."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "yarn-edge"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "yarn-edge"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yarn-edge"


def _scaling(
    path: Path, factor: float | str | None, n_ctx: int
) -> tuple[RuntimeArguments | None, dict[str, float], int | None]:
    """(arguments, metadata overrides, tokens that fit) of another factor; (None, {}, None) for the file's own."""
    if factor is None:
        return None, {}, None
    file = read_gguf(path)
    base = base_scaling(file, {})
    if base.method not in ("yarn", "none"):
        raise YarnEdgeError(f"{path}: has {base.method} scaling: --yarn-factor works with YaRN only")
    chosen = max(1.0, n_ctx / base.original_context) if factor == "auto" else float(factor)
    goal = with_factor(base, chosen)
    arguments, overrides = in_memory(file, goal, str(path))
    holds = round(base.original_context * max(1.0, chosen))
    if factor == "auto":
        own = f", the file's factor is {base.factor:g}" if base.method == "yarn" else ""
        note(f"--yarn-factor auto: {chosen:g} holds {n_ctx} tokens (original context {base.original_context}{own})")
    return arguments, overrides, holds


def _say(placed: Placement, wanted: Wanted, context: Context, holds: int) -> None:
    if placed.choice.n_ctx > holds:
        note(f"warning: --ctx {placed.choice.n_ctx} exceeds the {holds} tokens that the model was trained for")
    if wanted.ctx is None or (wanted.kv_type is None and context.kv_type != "f16"):
        note(placed.choice.reason)
    note(what_runs(context))
    _warn_of_other_positions(context)


def what_runs(context: Context) -> str:
    """One line: file, architecture, the scaling that the runtime applies, context, cache type, device."""
    gguf = _as_loaded(context)
    try:
        scaling, goal = effective(gguf, context.arguments), wanted_scaling(gguf)
    except YarnEdgeError:
        positions = "position scaling from the file, not checked"
    else:
        if not angle_error(scaling, goal).any_difference:
            scaling = goal  # the same angles, in the terms of the file's own description, such as YaRN for a baked file
        positions = "no position scaling" if scaling.frequency_factors is None else "frequency factors of its own"
        if scaling.method not in ("none", "llama3", "longrope"):
            positions = f"{_SCALINGS[scaling.method]} factor {scaling.factor:g} from {scaling.original_context}"
        if scaling.method == "yarn" or scaling.attention_factor != 1:
            positions += f", attention factor {scaling.attention_factor:.4f}"
    trained = context.model.n_ctx_train
    size = f"context {context.n_ctx}" + ("" if context.n_ctx == trained else f" of {trained}")
    where = "" if context.model.device is None else f", on {context.model.device.name}"
    return f"{gguf.path.name}: {gguf.architecture}, {positions}, {size}, {context.kv_type} cache{where}"


def _as_loaded(context: Context) -> GGUFFile:
    from yarn_edge.llama_rules.rescale import overridden

    return overridden(context.model.gguf, context.model.overrides)


def _warn_of_other_positions(context: Context) -> None:
    """Warn if the file's own description is not what runs. It still answers, as it would in any other program."""
    from yarn_edge.llama_rules.declared import explicit_arguments

    gguf = context.model.gguf
    if context.arguments != explicit_arguments(gguf):
        return  # requested
    try:
        error = angle_error(effective(gguf, context.arguments), wanted_scaling(gguf))
    except YarnEdgeError:
        return  # not checked, as the previous line says
    if error.any_difference:
        note(
            f"warning: {gguf.path.name} declares other positions than llama.cpp runs (frequencies up to {error.frequency:.2%} off, "
            f"attention factor {error.attention:.2%} off): see yarn-edge inspect"
        )
