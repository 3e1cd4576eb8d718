"""A model ready to answer: placed and loaded, with a context, states on disk, drafts, and the requested scaling.

`chat` and `serve` share this. Every choice that is made here rather than by the user is reported in a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from yarn_edge.engine.generation import Generation
from yarn_edge.engine.prompt_lookup import Lookup, PromptLookup
from yarn_edge.engine.sharing import default_parallel, say_shared, settings_for_several
from yarn_edge.engine.state_cache import MAX_BYTES, StateCache
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.rescale import base_scaling, in_memory, with_factor
from yarn_edge.memory.placement import Placement, Wanted, place
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.lora import LoraFile
from yarn_edge.runtime.model import Model

_SCALINGS = {"yarn": "YaRN", "linear": "linear scaling", "ntk": "NTK-aware scaling", "ntk-by-parts": "NTK-by-parts"}


@dataclass(frozen=True)
class EngineSettings:
    """cache: the folder of saved states, or None. yarn_factor: None for the file's own scaling. loras: adapters to add.
    parallel: answers that may run at once; None for as many as `default_parallel` says.
    """

    cache: Path | None = None
    cache_bytes: int = MAX_BYTES
    lookup: Lookup = "auto"
    yarn_factor: float | Literal["auto"] | None = None
    loras: tuple[LoraFile, ...] = ()
    parallel: int | None = 1


ANY_PLACE, DEFAULTS = Wanted(), EngineSettings()


@contextmanager
def opened(path: str | Path, wanted: Wanted = ANY_PLACE, settings: EngineSettings = DEFAULTS) -> Iterator[Generation]:
    """The loaded model, open until the block ends. Raises YarnEdgeError."""
    path = Path(path)
    states = None if settings.cache is None else StateCache(settings.cache, settings.cache_bytes)
    file = read_gguf(path)
    placed = place(path, replace(wanted, adapter_bytes=sum(lora.n_bytes for lora in settings.loras)), file)
    arguments, overrides, goal = _scaling(FilePositions(file), settings.yarn_factor, placed.choice.n_ctx)
    with ExitStack() as stack:
        model = stack.enter_context(Model(path, device=placed.device, overrides=overrides, gguf=file))
        model.add_loras(settings.loras)
        parallel = settings.parallel or default_parallel(model, placed.choice.n_ctx)
        chosen = settings_for_several(model, placed.choice.settings, parallel, wanted.attention)
        context = stack.enter_context(open_context(model, replace(chosen, arguments=arguments)))
        if model.recurrent and settings.lookup == "on":
            raise YarnEdgeError(
                f"{path}: --lookup on: the state of linear attention cannot go back to before a draft: choose auto or off"
            )
        _say(placed, wanted, context, goal)
        if settings.yarn_factor is None:
            _warn_of_other_positions(model.positions)
        lookup = None if settings.lookup == "off" or model.recurrent else PromptLookup(always=settings.lookup == "on")
        if parallel > 1:
            say_shared(context, parallel)
        yield Generation(context, states, lookup)


def _scaling(
    positions: FilePositions, factor: float | str | None, n_ctx: int
) -> tuple[RuntimeArguments | None, dict[str, float], RopeScaling | None]:
    """(arguments, metadata overrides, the scaling) of another factor; (None, {}, None) for the file's own."""
    if factor is None:
        return None, {}, None
    path, base = positions.file.path, base_scaling(positions)
    if base.method not in ("yarn", "none"):
        raise YarnEdgeError(f"{path}: has {base.method} scaling: --yarn-factor works with YaRN only")
    chosen = max(1.0, n_ctx / base.original_context) if factor == "auto" else float(factor)
    goal = with_factor(base, chosen)
    arguments, overrides = in_memory(positions, goal, str(path))
    if factor == "auto":
        own = f", the file's factor is {base.factor:g}" if base.method == "yarn" else ""
        note(f"--yarn-factor auto: {chosen:g} holds {n_ctx} tokens (original context {base.original_context}{own})")
    return arguments, overrides, goal


def _say(placed: Placement, wanted: Wanted, context: Context, goal: RopeScaling | None) -> None:
    holds = context.model.n_ctx_train if goal is None else goal.extended_context
    if placed.choice.n_ctx > holds:
        note(f"warning: --ctx {placed.choice.n_ctx} exceeds the {holds} tokens that the model was trained for")
    if wanted.ctx is None or (wanted.kv_type is None and context.kv_type != "f16"):
        note(placed.choice.reason)
    if wanted.ctx is not None and wanted.ctx != context.n_ctx:
        note(
            f"--ctx {wanted.ctx}: llama.cpp rounds a context up to a multiple of 256 tokens, so it holds {context.n_ctx}"
        )
    note(what_runs(context, goal))


def what_runs(context: Context, goal: RopeScaling | None = None) -> str:
    """One line: file, architecture, the scaling that the runtime applies, context, cache type, device.

    goal: the scaling that runs in place of the file's own.
    """
    positions = context.model.positions.at(context.n_ctx)
    gguf = positions.file
    try:
        scaling, error = positions.effective(context.arguments), positions.error(context.arguments)
    except YarnEdgeError:
        summary = "position scaling from the file, not checked"
    else:
        if goal is not None:
            scaling = goal
        elif not error.any_difference:
            scaling = positions.wanted  # the same angles, in the file's own terms, such as YaRN for a baked file
        summary = "no position scaling" if scaling.frequency_factors is None else "frequency factors of its own"
        if scaling.method not in ("none", "llama3", "longrope"):
            summary = f"{_SCALINGS[scaling.method]} factor {scaling.factor:g} from {scaling.original_context}"
        if scaling.method == "yarn" or scaling.attention_factor != 1:
            summary += f", attention factor {scaling.attention_factor:.4f}"
    trained = context.model.n_ctx_train
    size = f"context {context.n_ctx}" + ("" if context.n_ctx == trained else f" of {trained}")
    where = "" if context.model.device is None else f", on {context.model.device.name}"
    attention = ", fast attention" if context.settings.fast else ""
    loras = "".join(f" + {lora.name}" for lora in context.model.loras.files)
    return f"{gguf.path.name}{loras}: {gguf.architecture}, {summary}, {size}, {context.kv_type} cache{attention}{where}"


def _warn_of_other_positions(positions: FilePositions) -> None:
    """Warn if the file's own description is not what runs. It still answers, as it would in any other program."""
    try:
        error = positions.error(positions.explicit_arguments)
    except YarnEdgeError:
        return  # not checked, as the previous line says
    if error.any_difference:
        note(
            f"warning: {positions.file.path.name} declares other positions than llama.cpp runs (frequencies up to "
            f"{error.frequency:.2%} off, attention factor {error.attention:.2%} off): see yarn-edge inspect"
        )
