"""A context: the KV cache, evaluation in batches, logits, saved states.

The cache is never shifted: on a YaRN model a shift multiplies every cached key by the attention factor once more.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.batch import BatchPart, LlamaBatch
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.graph_hook import GraphHook
from yarn_edge.runtime.kv_cache import KV_TYPES, check_plain, check_room, kv_types
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.llama_api import clear_log, failure_reason, physical_threads
from yarn_edge.runtime.model import Model
from yarn_edge.signals import deferred_ctrl_c

MAX_DRAFT = 15

Outputs = Literal["none", "last", "all"]

_FLASH = {"auto": -1, "ggml": -1, "plain": 0}  # enum llama_flash_attn_type; 1 for all others


class Context:
    """A KV cache and evaluation of tokens in it. Use it as a context manager, or call `close`.

    hook: sees and edits the nodes of every graph (`yarn_edge.graph.open_context` makes it). Raises YarnEdgeError if llama.cpp
    cannot create the context (out of memory, an impossible cache type, …), and for a file whose positions are put into the
    live graph if the hook does not do so.
    """

    def __init__(self, model: Model, settings: ContextSettings, *, hook: GraphHook | None = None) -> None:
        self.model, self.api, self.settings = model, model.api, settings
        self.arguments = settings.arguments or model.positions.explicit_arguments
        n_ctx = settings.all_ctx or replace(settings, n_ctx=model.n_ctx_train).all_ctx
        if settings.attention == "plain":
            check_plain(model.gguf, settings.kv_type)
        if not model.no_alloc:
            check_room(model.gguf, n_ctx, settings.kv_type)
        if (
            self.arguments.live is not None
            and not model.no_alloc
            and (hook is None or hook.live != self.arguments.live)
        ):
            raise YarnEdgeError(
                f"{model.path}: its positions must be put into the live graph: open its contexts with yarn_edge.open_context"
            )
        params = self._params(n_ctx)
        if hook is not None:
            params.cb_eval, params.cb_eval_user_data = hook.callback, hook.user_data
        self._hook = hook  # must outlive the context
        clear_log()
        with deferred_ctrl_c() as pressed:
            self._handle = self.api.llama_init_from_model(model.handle, params)
            if pressed() and self._handle:
                self.api.llama_free(self._handle)
        if not self._handle:
            raise YarnEdgeError(
                f"{model.path}: no context of {n_ctx} tokens with a cache of type {self.kv_type}: {failure_reason()}"
            )
        model.loras.add_to(self._handle)
        self.n_ctx: int = self.api.llama_n_ctx_seq(self._handle)
        self.n_batch: int = self.api.llama_n_batch(self._handle)
        self.n_ubatch: int = self.api.llama_n_ubatch(self._handle)
        self._max_outputs: int = params.n_outputs_max
        self._memory = self.api.llama_get_memory(self._handle)
        self._batch = LlamaBatch(self.api, self.n_batch)
        self._n_outputs = 0
        self._logits_at = (0, 0)  # address and rows of the view
        self._logits_view = np.empty((0, model.n_vocab), np.float32)

    def _params(self, n_ctx: int) -> Any:
        """llama_context_params for a cache of `n_ctx` tokens, all sequences together."""
        settings, params = self.settings, self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx, settings.n_seq, settings.unified
        params.n_batch = min(settings.n_batch, n_ctx)
        params.n_ubatch = min(settings.n_ubatch or settings.n_batch, params.n_batch)
        params.n_outputs_max = min(settings.n_outputs, params.n_batch)
        params.n_threads = params.n_threads_batch = settings.threads or physical_threads()
        params.type_k, params.type_v = (KV_TYPES[kind][0] for kind in kv_types(settings.kv_type))
        params.flash_attn_type = _FLASH.get(settings.attention, 1)
        params.offload_kqv = params.op_offload = self.model.device is not None
        params.no_perf = True
        if settings.embeddings:
            params.embeddings, params.pooling_type = True, self.api.LLAMA_POOLING_TYPE_NONE
        for name, value in self.arguments.context_params.items():
            setattr(params, name, value)
        return params

    @property
    def kv_type(self) -> str:
        """The type of the cache, as in `kv_cache`."""
        return self.settings.kv_type

    @property
    def most_outputs(self) -> int:
        """Maximum number of tokens of one evaluation that can get logits."""
        return self._max_outputs or self.n_batch

    @property
    def handle(self) -> Any:
        """llama_context *, for the low-level API."""
        if self._handle is None:
            raise YarnEdgeError("the context was closed")
        return self._handle

    def evaluate(
        self,
        tokens: Sequence[int],
        start: int,
        outputs: Outputs | int = "last",
        advance: Callable[[float], None] | None = None,
    ) -> None:
        """Evaluate `tokens` at positions start, start + 1, …, in batches. `advance` gets the number of tokens of each batch.

        outputs: which tokens get logits; a number means that many of the last ones. More than one output requires at most
        `n_batch` tokens; read `logits` after each call.
        """
        if outputs == "last" and len(tokens) == 1:
            self._batch.fill_one(tokens[0], start)
            self._decode()
            if advance:
                advance(1)
            return
        wanted = {"none": 0, "last": 1, "all": len(tokens)}[outputs] if isinstance(outputs, str) else outputs
        if wanted > 1 and len(tokens) > self.n_batch:
            raise ValueError(f"{wanted} logits of {len(tokens)} tokens at once: a batch holds {self.n_batch} tokens")
        for at in range(0, len(tokens), self.n_batch):
            part = tokens[at : at + self.n_batch]
            is_last = at + len(part) == len(tokens)
            self._batch.fill([BatchPart(0, part, start + at, min(wanted, len(part)) if is_last else 0)])
            self._decode()
            if advance:
                advance(len(part))

    def evaluate_parts(self, parts: Sequence[BatchPart]) -> None:
        """Evaluate parts of sequences in one batch. Outputs are numbered as the tokens are. This context has one sequence."""
        (part,) = parts
        self.evaluate(part.tokens, part.start, "last" if part.outputs == 1 else part.outputs)

    def evaluate_side_by_side(self, sequences: Sequence[Sequence[int]], start: int = 0) -> None:
        """Evaluate sequences of equal length, each in its own cache, starting at position `start`, in batches.

        Every token is an output, so that the last layer computes them all; only the last batch's logits are kept.
        """
        step = self.n_batch // len(sequences)
        if not step or len({len(tokens) for tokens in sequences}) != 1:
            raise ValueError(
                f"{len(sequences)} sequences must have the same length and fit into batches of {self.n_batch} tokens"
            )
        for at in range(0, len(sequences[0]), step):
            parts = [tokens[at : at + step] for tokens in sequences]
            self._batch.fill([BatchPart(n, part, start + at, len(part)) for n, part in enumerate(parts)])
            self._decode()

    def _decode(self) -> None:
        if self._max_outputs and self._batch.n_outputs > self._max_outputs:
            raise ValueError(
                f"{self._batch.n_outputs} outputs in a batch, but memory is reserved for {self._max_outputs}"
            )
        if self._hook is not None:
            self._hook.begin()
        in_python = self._hook is not None and self._hook.in_python  # no Ctrl-C inside the callback
        with deferred_ctrl_c() if in_python or isinstance(self.model.device, LayerSplit) else nullcontext():
            code = self.api.llama_decode(self.handle, self._batch.struct)
        if self._hook is not None and code in (0, 2):
            self._hook.check(complete=not code)
        if code == 1:
            raise YarnEdgeError(f"the context of {self.n_ctx} tokens is full")
        if code == 2:
            raise KeyboardInterrupt
        if code:
            raise YarnEdgeError(f"llama.cpp cannot evaluate (code {code}): {failure_reason()}")
        self._n_outputs = self._batch.n_outputs

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the last `evaluate`, shape (n_outputs, n_vocab): a copy, which later evaluations do not change."""
        return self.logits_in_place().copy()

    def logits_in_place(self) -> npt.NDArray[np.float32]:
        """`logits` without copying: valid until the next evaluation or until the context is closed."""
        if not self._n_outputs:
            raise ValueError("the last evaluation requested no logits")
        data = self.api.llama_get_logits(self.handle)
        where = (ctypes.addressof(data.contents), self._n_outputs)
        if where != self._logits_at:  # creating a view takes longer than finding the best logit in it
            self._logits_view = np.ctypeslib.as_array(data, shape=(self._n_outputs, self.model.n_vocab))
            self._logits_at = where
        return self._logits_view

    def logits_of(self, output: int) -> npt.NDArray[np.float32]:
        """The logits of one output, numbered as in `sample`, without copying."""
        row: npt.NDArray[np.float32] = self.logits_in_place()[output]
        return row

    def synchronize(self) -> None:
        """Wait until the last evaluation is done (GPUs work asynchronously)."""
        with deferred_ctrl_c():
            self.api.llama_synchronize(self.handle)

    def save_state(self, path: Path, tokens: Sequence[int], sequence: int = 0) -> None:
        """Write the cache of a sequence, which holds `tokens`, to `path`. Raises YarnEdgeError, for example if the disk is full."""
        data = (self.api.llama_token * len(tokens))(*tokens)
        with deferred_ctrl_c():
            written = self.api.llama_state_seq_save_file(self.handle, os.fsencode(path), sequence, data, len(tokens))
        if not written or written != path.stat().st_size:
            raise YarnEdgeError(f"{path}: the cache of {len(tokens)} tokens cannot be written: {failure_reason()}")

    def load_state(self, path: Path, tokens: Sequence[int], sequence: int = 0) -> bool:
        """Fill a sequence from a file written by `save_state`. False, with an empty sequence, if the file does not hold `tokens`.

        The caller must know that the file is intact: llama.cpp checks very little of it.
        """
        room = len(tokens) + 1
        found, count = (self.api.llama_token * room)(), ctypes.c_size_t(0)
        self.clear(sequence)
        clear_log()
        with deferred_ctrl_c():
            read = self.api.llama_state_seq_load_file(
                self.handle, os.fsencode(path), sequence, found, room, ctypes.byref(count)
            )
        if read and list(found[: count.value]) == list(tokens):
            return True
        self.clear(sequence)
        return False

    def sample(self, sampler: Any, output: int = -1) -> int:
        """The next token, chosen by a llama_sampler chain (see `yarn_edge.engine.sampling`) from the logits of one output.

        sampler: None takes the most probable token, and the first one among equals (or NaNs); llama.cpp's greedy chain copies
        all logits first. output: index of the token in the last evaluation, whose first tokens must be the outputs; -1 means
        the last token.
        """
        if sampler is None:
            return int(self.logits_of(output).argmax())
        return int(self.api.llama_sampler_sample(sampler, self.handle, output))

    def keep(self, n_tokens: int, sequence: int = 0) -> None:
        """Drop everything from position `n_tokens` on. What remains is not moved: the cache is never shifted."""
        if not self.api.llama_memory_seq_rm(self._memory, sequence, n_tokens, -1):
            raise YarnEdgeError(f"{self.model.path}: the state of recurrent layers cannot go back to token {n_tokens}")

    def clear(self, _sequence: int = 0) -> None:
        """Empty the cache; in a unified one only what this sequence holds of it."""
        self.api.llama_memory_clear(self._memory, False)

    @contextmanager
    def interruptible(self) -> Iterator[Callable[[], None]]:
        """While open, calling the yielded function stops a running evaluation with KeyboardInterrupt (CPU only)."""
        stop = [False]

        @self.api.ggml_abort_callback  # type: ignore[untyped-decorator]
        def aborted(_user_data: object) -> bool:
            return stop[0]

        def interrupt() -> None:
            stop[0] = True

        self.api.llama_set_abort_callback(self.handle, aborted, None)
        try:
            yield interrupt
        finally:
            self.api.llama_set_abort_callback(self.handle, self.api.ggml_abort_callback(), None)

    def close(self) -> None:
        """Free the cache."""
        with deferred_ctrl_c():
            if self._handle:
                self._batch.free()
                self.api.llama_free(self._handle)
                if self._hook is not None:
                    self._hook.close()
            self._handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
