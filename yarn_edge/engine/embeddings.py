"""Vectors of texts: what the last layer makes of their tokens, pooled as the file says, of length 1.

The tokens are evaluated in slices and pooled here, in float64, so memory grows with the cache only; llama.cpp pools within one graph,
which must then hold the whole text. The context is made when it is first needed, if there is memory for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.graph.opening import open_context
from yarn_edge.memory.choice import gib
from yarn_edge.memory.plan import Simulation
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.runtime.model import Model

LEAST_CTX, SLICE = 256, 128  # tokens
Vector = npt.NDArray[np.float64]
# {arch}.pooling_type (enum llama_pooling_type) -> its name here; a file that says nothing, or none, gets the mean.
_POOLINGS = {0: "mean", 1: "mean", 2: "first", 3: "last"}


class Embedder:
    """Makes vectors with a model that is loaded. settings: of the context that answers, after which the own one is made.

    Not for several threads at once. Call `close` before the model is closed.
    """

    def __init__(self, model: Model, settings: ContextSettings, n_ctx: int) -> None:
        self.model, self._settings, self._most = model, settings, n_ctx
        self._context: Context | None = None

    def vector(self, tokens: Sequence[int], stopped: Callable[[], bool] = lambda: False) -> Vector:
        """The vector of a text, shape (n_embd,), of length 1.

        stopped: asked between slices; KeyboardInterrupt if it says so. Raises YarnEdgeError if the text is empty or too long, if there
        is no memory for a context, or if the file's way to pool makes no vector.
        """
        pooling = pooling_of(self.model.gguf)
        context = self._opened()
        if not tokens:
            raise YarnEdgeError("an empty text has no embedding")
        if len(tokens) > context.n_ctx:
            raise YarnEdgeError(f"the text has {len(tokens)} tokens, the context for embeddings holds {context.n_ctx}")
        context.clear()
        pooled = np.zeros(self._n_embd, np.float64)
        for start in range(0, len(tokens), context.n_batch):
            if stopped():
                raise KeyboardInterrupt
            part = tokens[start : start + context.n_batch]
            context.evaluate(part, start, "all")
            rows = self._rows(context, len(part))
            if pooling == "mean":
                pooled += rows.sum(axis=0, dtype=np.float64)
            elif pooling == "last" or start == 0:
                pooled[:] = rows[0 if pooling == "first" else -1]
        length = float(np.linalg.norm(pooled))
        if not np.isfinite(length) or not length:
            raise YarnEdgeError("the model makes no numbers of this text")
        return pooled / length

    @property
    def n_ctx(self) -> int:
        """The longest text in tokens. Raises YarnEdgeError if there is no memory for a context."""
        return self._opened().n_ctx

    @property
    def _n_embd(self) -> int:
        return int(self.model.api.llama_model_n_embd_out(self.model.handle))

    def _rows(self, context: Context, count: int) -> npt.NDArray[np.float32]:
        data = self.model.api.llama_get_embeddings(context.handle)
        return np.ctypeslib.as_array(data, (count, self._n_embd))

    def _opened(self) -> Context:
        if self._context is None:
            self._context = open_context(self.model, self._fitting())
        return self._context

    def _fitting(self) -> ContextSettings:
        """Settings of the longest context for which there is memory, at most as long as the one that answers."""
        device = self.model.device
        if isinstance(device, LayerSplit):
            raise YarnEdgeError(
                f"embeddings are not supported with layers on {device.name}: put the model onto one device"
            )
        graph = min(self._settings.n_ubatch or SLICE, SLICE)
        wanted = replace(
            self._settings,
            n_ctx=self._most,
            n_seq=1,
            n_batch=SLICE,
            n_ubatch=graph,
            n_outputs=0,
            unified=False,
            embeddings=True,
        )
        with Simulation(self.model.path, device=device, gguf=self.model.gguf) as simulation:
            for settings in _shorter(wanted):
                needed = _bytes_of(simulation, settings)
                if needed <= _free_bytes(device):
                    return settings
        raise YarnEdgeError(
            f"no memory for embeddings: a context of {settings.n_ctx} tokens beside the one that answers needs {gib(needed)}"
        )

    def close(self) -> None:
        """Free the context."""
        if self._context is not None:
            self._context.close()
        self._context = None


def pooling_of(file: GGUFFile) -> str:
    """mean, first or last. Raises YarnEdgeError for a file whose way to pool makes no vector, such as a reranker's."""
    key = f"{file.architecture}.pooling_type"
    kind = file.metadata.get(key, 0)
    if not isinstance(kind, int) or kind not in _POOLINGS:
        raise YarnEdgeError(f"{file.path}: {key} is {kind!r}: it makes no vectors of texts")
    return _POOLINGS[kind]


def _shorter(settings: ContextSettings) -> Iterator[ContextSettings]:
    """The same with a context of half the size each time."""
    n_ctx = settings.n_ctx
    while True:
        yield replace(settings, n_ctx=max(n_ctx, LEAST_CTX))
        if n_ctx <= LEAST_CTX:
            return
        n_ctx //= 2


def _bytes_of(simulation: Simulation, settings: ContextSettings) -> int:
    """What a context adds to a loaded model."""
    plan = simulation.plan_of(settings)
    if plan.device_bytes is not None:
        return plan.device_bytes - simulation.weights.on_device
    return plan.kv_bytes + plan.compute_bytes + plan.output_bytes


def _free_bytes(device: ggml.Device | None) -> int:
    return spare_bytes(None if device is None else ggml.device_memory(device)[0])
