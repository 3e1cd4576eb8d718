"""A conversation from Python: `with open_chat("model.gguf") as chat: chat.stream("Hello")`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from yarn_edge.chat.session import Session
from yarn_edge.chat.template import ChatTemplate, RawText, Renderer
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.sampling import Sampling
from yarn_edge.memory.placement import Wanted
from yarn_edge.progress import note


@contextmanager
def open_chat(
    path: str | Path,
    *,
    ctx: int | None = None,
    kv_type: str | None = None,
    backend: str | None = None,
    system: str | None = None,
    sampling: Sampling | None = None,
    cache: str | Path | None = None,
    raw: bool = False,
) -> Iterator[Session]:
    """Load a model and start a conversation with it; everything is freed when the block ends.

    ctx: context in tokens, kv_type: type of the KV cache, backend: cpu, cuda, metal or vulkan; None chooses as `yarn-edge chat`
    does. system: the system prompt. sampling: how tokens are chosen (default: llama.cpp's defaults). cache: a folder that keeps
    evaluated documents on disk. raw: continue the text as it is, without the model's chat template.
    Raises YarnEdgeError if the model does not fit, or has no chat template and `raw` is False.
    """
    wanted = Wanted(backend=backend, ctx=ctx, kv_type=kv_type)
    settings = EngineSettings(None if cache is None else Path(cache))
    with opened(Path(path), wanted, settings) as generation:
        renderer: Renderer = RawText() if raw else ChatTemplate.of(generation.context.model)
        with closing(renderer):
            yield Session(generation, renderer, sampling or Sampling(), system=system, notice=note)
            generation.keep_on_disk()
