"""One configuration of `yarn-edge bench`, in a process of its own: a crash ends nothing else, and its memory is its own.

`python -m yarn_edge.bench.speed.child` reads a `Request` as one line of JSON and reports events as lines of JSON: loaded, step, test,
rope, failed, done. stdin stays open; when it ends, the parent is gone, and this process ends too.
Tests are those of llama-bench: random tokens after the BOS, a warm-up, everything synchronized before the clock is read.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from yarn_edge.attention.choose import fastest_attention
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.memory.splitting import SplitNeeds, split_place
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.kv_cache import has_plain_cache
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.llama_api import captured_log
from yarn_edge.runtime.load_log import buffers_in, flash_attention_in, offloaded_in
from yarn_edge.runtime.machine import peak_resident_bytes
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import SplitRequest
from yarn_edge.verify.checks import check_kernel

from ..scoring.variants import Variant, on_devices, parse_variant
from .configuration import misplaced, misplaced_split

SEED = 1
Tell = Callable[..., None]


@dataclass(frozen=True)
class Request:
    """What to measure. model: as in `variants`; n_ctx: of the cache; samples: timed runs of each test; split: as a `SplitRequest`."""

    model: str
    backend: str
    kv_type: str
    depth: int
    n_prompt: int
    n_gen: int
    n_ctx: int
    threads: int
    n_batch: int
    n_ubatch: int
    attention: Attention
    samples: int
    split: tuple[Sequence[str], str, bool] | None = None


def run_request(request: Request, tell: Tell) -> None:
    """Load, check where everything is, measure, check the rope kernel. Raises YarnEdgeError with the reason for a failure."""
    start = time.perf_counter()
    variant = _variant(request)
    with ExitStack() as held:
        with captured_log() as log:
            model = held.enter_context(variant.load())
            context = held.enter_context(_context(request, variant, model))
        load_s, text = time.perf_counter() - start, "".join(log)
        device = model.device.name if model.device else None
        buffers = buffers_in(text)
        tell(
            "loaded",
            load_s=load_s,
            device=device or "CPU",
            flash_attention_used=flash_attention_in(text),
            attention_used=context.settings.attention,
            offloaded=offloaded_in(text),
            buffers=[list(b) for b in buffers],
            **_described(model),
        )
        split = model.device if isinstance(model.device, LayerSplit) else None
        elsewhere = misplaced(buffers, device, offloaded_in(text)) if split is None else misplaced_split(buffers, split)
        if elsewhere is not None:
            raise YarnEdgeError(elsewhere)
        gc.collect()
        gc.disable()  # no collection falls into a timed run
        Bench(request, model, context, tell).run()
        tell("rope", **_rope(variant, model))


def _variant(request: Request) -> Variant:
    if request.split is None:
        return parse_variant(request.model, kv_type=request.kv_type, backend=request.backend)
    variant = parse_variant(request.model, kv_type=request.kv_type)
    workers, layers_on, insecure = request.split
    needs = SplitNeeds(request.n_ctx, variant.kv_type, None, request.threads, request.attention)
    place = split_place(SplitRequest(tuple(workers), layers_on, insecure), variant.path, needs, variant.gguf)
    return on_devices(variant, place.split)


def _context(request: Request, variant: Variant, model: Model) -> Context:
    settings = ContextSettings(
        n_ctx=request.n_ctx,
        n_batch=request.n_batch,
        n_ubatch=request.n_ubatch,
        kv_type=variant.kv_type,
        threads=request.threads,
        arguments=variant.arguments,
        attention=request.attention,
    )
    if settings.attention == "auto":
        kind = fastest_attention(settings, model.gguf) if model.device is None else "ggml"
        settings = replace(settings, attention=kind)
    return open_context(model, settings)


def _described(model: Model) -> dict[str, Any]:
    """llama-bench's columns that describe the model."""
    text = ctypes.create_string_buffer(128)
    model.api.llama_model_desc(model.handle, text, len(text))
    return {
        "model_type": text.value.decode(errors="replace"),
        "model_size": int(model.api.llama_model_size(model.handle)),
        "model_n_params": int(model.api.llama_model_n_params(model.handle)),
        "n_gpu_layers": -1 if model.device else 0,
    }


def _rope(variant: Variant, model: Model) -> dict[str, Any]:
    """The rope kernel of this backend with the scaling that this file runs, against the float64 reference (as in verify)."""
    try:
        honoured(model.gguf.architecture)
        runs = model.positions.effective(variant.arguments or model.positions.explicit_arguments)
        checks = [check_kernel(runs, runs, model.gguf.architecture, d, d.name) for d in model.devices]
        # A failure first: NaN is one, but no maximum.
        check = max(checks, key=lambda check: (check.status == "fail", check.value or 0.0))
    except YarnEdgeError as refusal:  # an architecture whose positions are not known
        return {"status": "skip", "value": None, "limit": None, "detail": str(refusal)}
    return {"status": check.status, "value": check.value, "limit": check.limit, "detail": check.detail}


class Bench:
    """The tests of one configuration in one context."""

    def __init__(self, request: Request, model: Model, context: Context, tell: Tell) -> None:
        self.request, self.model, self.context, self.tell = request, model, context, tell
        random = np.random.default_rng(SEED)
        longest = max(request.depth, request.n_prompt, request.n_gen, 1)
        self.tokens: list[int] = random.integers(0, model.n_vocab, longest).tolist()
        if model.add_bos and model.bos >= 0:
            self.tokens[0] = model.bos
        # The cache of a sliding window forgets what is before the window: cut back, it would differ from a filled one.
        self.cut_back = has_plain_cache(model.gguf)

    def run(self) -> None:
        """Warm up, fill the cache to the depth, then every test."""
        request = self.request
        self.tell("step", what="warming up")
        if request.n_prompt:
            self.read(self.tokens[: request.n_prompt], 0)
        if request.n_gen:
            self.context.clear()
            self.generate(1, 0)
        self.context.clear()
        if request.depth:
            took = self._fill()
            self.tell("test", test="ttft", samples_ns=[took], peak_rss_bytes=peak_resident_bytes())
        if request.n_prompt:
            self._test("pp", lambda: self.read(self.tokens[: request.n_prompt], request.depth))
        if request.n_gen:
            self._test("tg", lambda: self.generate(request.n_gen, request.depth))
            with Sampling(temperature=0).chain(self.model) as chain:
                self._test("tg+s", lambda: self.generate_sampled(request.n_gen, request.depth, chain))

    def _test(self, name: str, work: Callable[[], None]) -> None:
        samples: list[int] = []
        for number in range(self.request.samples):
            self._rewind(filled=not samples and name == "pp")
            start = time.perf_counter_ns()
            self.tell("step", what=name, number=number + 1)  # while the clock runs, as in llama-bench, for `lockstep`
            work()
            samples.append(time.perf_counter_ns() - start)
        self.tell("test", test=name, samples_ns=samples, peak_rss_bytes=peak_resident_bytes())

    def _rewind(self, filled: bool) -> None:
        """Bring the cache to the state that it has when filled to the depth."""
        if not self.request.depth:
            self.context.clear()
        elif self.cut_back or filled:
            self.context.keep(self.request.depth)
        else:
            self.context.clear()
            self._fill()
        self.context.synchronize()

    def _fill(self) -> int:
        """Read a document of `depth` tokens, up to the first token of the answer. Returns nanoseconds."""
        with Sampling(temperature=0).chain(self.model) as chain:
            self.context.synchronize()
            start = time.perf_counter_ns()
            self.context.evaluate(self.tokens[: self.request.depth], 0, "last", self._filled)
            self.context.sample(chain)
            return time.perf_counter_ns() - start

    def _filled(self, n_tokens: float) -> None:
        self.tell("step", what="ttft", tokens=n_tokens)

    def read(self, tokens: Sequence[int], at: int) -> None:
        """llama-bench's test_prompt: in batches, each with the logits of its last token."""
        step = self.context.n_batch
        for start in range(0, len(tokens), step):
            self.context.evaluate(tokens[start : start + step], at + start, "last")
        self.context.synchronize()

    def generate(self, count: int, at: int) -> None:
        """llama-bench's test_gen: random tokens one after another, waiting for each."""
        evaluate, synchronize = self.context.evaluate, self.context.synchronize
        for position, token in enumerate(self.tokens[:count], at):
            evaluate((token,), position, "last")
            synchronize()

    def generate_sampled(self, count: int, at: int, chain: Any) -> None:
        """What a chat does: the most probable token is chosen from the logits and evaluated next."""
        evaluate, sample = self.context.evaluate, self.context.sample
        token = self.tokens[0]
        for position in range(at, at + count):
            evaluate((token,), position, "last")
            token = sample(chain)


def _end_with_parent() -> None:
    """End this process when stdin ends: the parent holds its other end, and even a parent that is killed lets go of it."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> int:
    """Serve one request. Returns 0 even after a failure, if it was reported."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is not an event

    def tell(event: str, **values: Any) -> None:
        out.write(json.dumps({"event": event, **values}) + "\n")
        out.flush()

    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            return 1
        line += part
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        run_request(Request(**json.loads(line)), tell)
    except YarnEdgeError as error:
        tell("failed", reason=str(error))
    except MemoryError:
        tell("failed", reason="out of memory")
    else:
        tell("done")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a thread is still waiting for stdin
