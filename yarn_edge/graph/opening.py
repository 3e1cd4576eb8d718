"""Contexts whose graph is seen or changed: the way to open a context for every command that evaluates."""

from __future__ import annotations

from yarn_edge.graph.callback import GraphCallback, GraphEdit
from yarn_edge.graph.fast_attention import FastAttention
from yarn_edge.graph.live_rope import LiveRopes
from yarn_edge.graph.tap import GraphTap
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.unified import UnifiedContext


def open_context(model: Model, settings: ContextSettings, tap: GraphTap | None = None) -> Context:
    """A `Context`, with the positions that its file, or settings.arguments, want in the live graph, and with our own attention.

    tap: sees every node.

    Files whose positions llama.cpp runs by itself get no callback. Raises YarnEdgeError.
    """
    live = (settings.arguments or model.positions.explicit_arguments).live
    edits: list[GraphEdit] = [] if live is None else [LiveRopes(model, live)]
    if settings.fast and not model.no_alloc:
        few, many = settings.attention != "fast-many", settings.attention != "fast-few"
        edits.append(FastAttention(model, settings, few=few, many=many))
    kind = UnifiedContext if settings.unified else Context
    if not edits and tap is None:
        return kind(model, settings)
    hook = GraphCallback(edits, tap)
    try:
        return kind(model, settings, hook=hook)
    except BaseException:
        hook.close()
        raise
