"""How several answers share one context: how many, and with which attention."""

from __future__ import annotations

from dataclasses import replace

from yarn_edge.attention.compiled import kernel_of, why_not_compiled
from yarn_edge.attention.kernel_shapes import kernel_shapes, no_kernels
from yarn_edge.engine.repeatable import why_not_repeatable
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.model import Model

USUAL_PARALLEL, LEAST_CELLS = 4, 2048


def default_parallel(model: Model, n_ctx: int) -> int:
    """Answers that may run at once: 4, or as many as leave 2048 tokens of the context for each. They share its memory, which `fit` has
    planned, so each of them takes next to none.
    """
    return 1 if model.recurrent else max(1, min(USUAL_PARALLEL, n_ctx // LEAST_CELLS))


def settings_for_several(
    model: Model, settings: ContextSettings, parallel: int, attention: Attention
) -> ContextSettings:
    """The settings of a context for so many answers at once, and as many that are over and may be continued.

    attention: what was asked for; "auto" takes our kernels where there are any: they read each answer's cells in order. Raises
    YarnEdgeError for a model that cannot share.
    """
    if parallel == 1:
        return settings
    if model.recurrent:
        raise YarnEdgeError(
            f"{model.path}: --parallel {parallel}: the state of linear attention is that of one conversation: choose 1"
        )
    n_seq = 2 * parallel + 1
    outputs = max(settings.n_outputs, n_seq)  # llama.cpp wants one for each sequence
    settings = replace(settings, n_seq=n_seq, unified=True, n_outputs=outputs)
    on_cpu, none = model.device is None, no_kernels(model.gguf, settings.kv_type)
    if attention != "auto" or not on_cpu or none is not None or why_not_compiled() is not None:
        return settings
    try:
        for _, shape in kernel_shapes(model.gguf, settings.kv_type):
            kernel_of(shape)
    except Exception:  # `yarn_edge.attention.choose` has said why
        return settings
    return replace(settings, attention="fast", n_ubatch=None)


def say_shared(context: Context, parallel: int) -> None:
    """A note on how many answers run at once, and whether they depend on each other."""
    why = why_not_repeatable(context)
    text = (
        "at temperature 0, or with a seed, each is what it would be alone"
        if why is None
        else f"each may depend on the others: {why}"
    )
    note(f"up to {parallel} answers at once share the context of {context.n_ctx} tokens; {text}")
