"""What a model will take before it is loaded: weights, cache, buffers and process, in bytes, as llama.cpp itself says.

llama.cpp can make a context without allocating anything (`Model(no_alloc=True)`): some 10 ms each, and it logs the sizes
that it would need. So grouped heads, sliding windows, latent attention and recurrent states need no formulas here. What
llama.cpp does not tell (mapped file, repacked copies, the process) is measured or counted, each with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory.log_sizes import MIB, ContextSizes, allocated_bytes, context_sizes
from yarn_edge.memory.weights import Weights, weights_in_memory
from yarn_edge.runtime import ggml
from yarn_edge.runtime.attention import Attention, FlashAttention, attention_for, last_contexts
from yarn_edge.runtime.context import MAX_DRAFT, Context
from yarn_edge.runtime.llama_api import captured_log, physical_threads
from yarn_edge.runtime.machine import resident_bytes
from yarn_edge.runtime.model import Model

CTX_STEP = 256  # llama.cpp rounds contexts up to a multiple of it
LEAST_CTX = 512  # less is no conversation
OUTPUTS = 1 + MAX_DRAFT  # tokens of a batch that may get logits in a conversation
# The bookkeeping of cells is allocated even in a simulation. Beyond so many, sizes are taken to grow in proportion.
MOST_SIMULATED = 2**20
_UNUSED = re.compile(r"model has unused tensor (\S+) ")
# llama-kv-cells.h: position 4, extension 12, shift 4, sequences 32 bytes; once it is used two nodes of std::set, 48 bytes each.
_CELL_BYTES = 4 + 12 + 4 + 32 + 2 * 48
# Kernels and OpenMP's code, read from disk when they first run, and what llama.cpp allocates with the first batch.
_FIRST_RUN_BYTES = 5 * MIB
# On a device: kernels, cuBLAS and its workspace. 92 to 94 MiB on an H200 with CUDA 13, whatever the model (docs/cuda.md).
_DEVICE_FIRST_RUN_BYTES = 100 * MIB


@dataclass(frozen=True)
class MemoryPlan:
    """What a model with one context takes at its peak, in bytes.

    weights: the mapped file, or what lies on a device; repacked: the CPU's second copy of some; kv: the cache, recurrent
    states with it; compute: buffers of the graph, as far as they are written; output: logits; process: Python, llama.cpp,
    the vocabulary, bookkeeping. device_bytes: how many of all of them lie on a device, None where all is on the CPU.
    """

    n_ctx: int
    kv_type: str
    weights_bytes: int
    repacked_bytes: int
    kv_bytes: int
    compute_bytes: int
    output_bytes: int
    process_bytes: int
    device_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """All parts."""
        held = self.weights_bytes + self.repacked_bytes + self.kv_bytes
        return held + self.compute_bytes + self.output_bytes + self.process_bytes

    @property
    def taken_bytes(self) -> int:
        """What counts against a budget: all of it on the CPU, on a device what lies there."""
        return self.total_bytes if self.device_bytes is None else self.device_bytes


class Simulation:
    """A GGUF's header and vocabulary in llama.cpp, without weights. Use as a context manager, or call `close`.

    device: where layers and cache would go; the CPU by default. flash_attention: as in `yarn_edge.runtime.attention`. process_bytes:
    what a process holds that has loaded the header; by default measured in this one. gguf: as in `Model`. Raises YarnEdgeError
    for a file that cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: ggml.Device | None = None,
        threads: int | None = None,
        flash_attention: FlashAttention = "auto",
        process_bytes: int | None = None,
        gguf: GGUFFile | None = None,
    ) -> None:
        self.file: GGUFFile = gguf or read_gguf(path)
        if not self.file.tensors:
            raise YarnEdgeError(f"{path}: has a vocabulary and no weights: there is nothing to run")
        with captured_log() as log:
            self.model = Model(path, no_alloc=True, device=device, gguf=self.file)  # tokenizes, too
        self.device = self.model.device
        self.threads, self.flash_attention = threads or physical_threads(), flash_attention
        self.n_ctx_train: int = self.model.n_ctx_train
        self._known: dict[tuple[int, str, int, int, Attention], ContextSizes | YarnEdgeError] = {}
        self.process_bytes = process_bytes or 0  # with header and vocabulary
        self.unused = frozenset(m[1] for m in map(_UNUSED.search, log) if m)  # tensors that llama.cpp does not load
        try:
            self.weights = weights_in_memory(self.file, self.unused)
            self.plan(LEAST_CTX)  # the process is measured while there is little in it
        except BaseException:
            self.close()
            raise

    def plan(
        self,
        n_ctx: int,
        kv_type: str = "f16",
        *,
        n_batch: int = 512,
        n_outputs: int = OUTPUTS,
        weights: Weights | None = None,
    ) -> MemoryPlan:
        """The plan for one context. n_outputs: tokens of a batch that may get logits, by default as in a conversation, 0 for all.

        weights: of another file of the same model, such as a quantization that is not made yet. Raises YarnEdgeError where
        llama.cpp makes no such context (a cache type that the size of the heads does not allow).
        """
        sizes = self._sizes(n_ctx, kv_type, n_batch, n_outputs)
        weights = weights or self.weights
        output = sizes.output * max(1, n_outputs)  # logged is that of one token; it grows when more are asked for
        process = self.process_bytes + sizes.cells * _CELL_BYTES + sizes.work + _FIRST_RUN_BYTES
        if self.device is not None:
            on_device = weights.tensors - weights.embeddings + sizes.kv + sizes.on_device + _DEVICE_FIRST_RUN_BYTES
            return MemoryPlan(n_ctx, kv_type, weights.tensors, 0, sizes.kv, sizes.compute, output, process, on_device)
        # The peak may be the loading: all of the file is mapped then, and there is no cache yet.
        later = sizes.kv + sizes.compute + output
        mapped = max(weights.mapped, weights.at_load - later)
        return MemoryPlan(n_ctx, kv_type, mapped, weights.repacked, sizes.kv, sizes.compute, output, process)

    def refusal(self, kv_type: str) -> str | None:
        """Why this model can have no cache of this type, None if it can."""
        try:
            self.plan(LEAST_CTX, kv_type)
        except YarnEdgeError as error:
            return str(error)
        return None

    def longest_context(
        self, budget_bytes: int, kv_type: str, limit: int, *, weights: Weights | None = None, n_batch: int = 512
    ) -> int:
        """The longest context, up to `limit`, whose plan takes at most `budget_bytes` (on a device: there).

        Below `limit` a multiple of CTX_STEP. 0 if not even LEAST_CTX tokens fit.
        """

        def taken(n_ctx: int) -> int:
            return self.plan(n_ctx, kv_type, n_batch=n_batch, weights=weights).taken_bytes

        if taken(limit) <= budget_bytes:
            return limit
        # Sizes grow with the context up to where the attention needs smaller graphs; there they fall.
        ends = [end // CTX_STEP * CTX_STEP for end in last_contexts(self.file, limit)[:-1]]
        begins = [LEAST_CTX, *(end + CTX_STEP for end in ends)]
        for begin, end in reversed(list(zip(begins, [*ends, limit], strict=True))):
            if begin > end or begin >= limit or taken(begin) > budget_bytes:
                continue
            if end < limit and taken(end) <= budget_bytes:
                return end
            steps = _last_that_fits(lambda n: taken(n * CTX_STEP), begin // CTX_STEP, -(-end // CTX_STEP), budget_bytes)
            return steps * CTX_STEP
        return 0

    def _sizes(self, n_ctx: int, kv_type: str, n_batch: int, n_outputs: int) -> ContextSizes:
        n_ctx = -(-n_ctx // CTX_STEP) * CTX_STEP
        attention = attention_for(self.file, n_ctx, kv_type, self.device, self.flash_attention, n_batch)

        def known(n: int) -> ContextSizes:
            key = (n, kv_type, n_batch, n_outputs, attention)
            if key not in self._known:
                try:
                    self._known[key] = self._simulated(*key)
                except YarnEdgeError as error:
                    self._known[key] = error
            found = self._known[key]
            if isinstance(found, YarnEdgeError):
                raise found
            return found

        if n_ctx <= MOST_SIMULATED:
            return known(n_ctx)
        half = MOST_SIMULATED // 2
        near, far = vars(known(half)), vars(known(MOST_SIMULATED))
        more = (n_ctx - MOST_SIMULATED) / half
        return ContextSizes(**{name: far[name] + round(more * (far[name] - near[name])) for name in far})

    def _simulated(self, n_ctx: int, kv_type: str, n_batch: int, n_outputs: int, attention: Attention) -> ContextSizes:
        with (
            captured_log() as log,
            Context(
                self.model,
                n_ctx=n_ctx,
                n_batch=n_batch,
                n_ubatch=attention.n_ubatch,
                n_outputs=n_outputs,
                kv_type=kv_type,
                threads=self.threads,
                flash_attention=attention.flash,
            ),
        ):
            if not self.process_bytes:  # what is allocated even here counts as what it is
                self.process_bytes = max(MIB, resident_bytes() - allocated_bytes(log))
        return context_sizes(log, self.file, attention.n_ubatch, self.threads, self.device)

    def close(self) -> None:
        """Free the header and the vocabulary."""
        self.model.close()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class ContextChoice:
    """A context and a cache type that fit, and why these. Takes `plan.taken_bytes`."""

    n_ctx: int
    kv_type: str
    plan: MemoryPlan
    reason: str


class DoesNotFitError(YarnEdgeError):
    """The model, or the context that was asked for, takes more memory than there is."""


def choose_context(
    model: Simulation,
    budget_bytes: int,
    wanted_ctx: int | None,
    kv_type: str | None = None,
    *,
    weights: Weights | None = None,
) -> ContextChoice:
    """A context and cache type within `budget_bytes` (on a device: there).

    wanted_ctx: what the user asked for, None for as much as the model was trained for. kv_type: None for f16 if that fits,
    else q8_0, which costs next to no quality; else, if no context was asked for, fewer tokens in the last of them.
    Raises DoesNotFitError, which tells the longest contexts, where what was asked for does not fit, or nothing does, and
    YarnEdgeError where the model can have no cache of the type that was asked for.
    """
    limit = wanted_ctx or model.n_ctx_train
    told = f"{limit} tokens" if wanted_ctx else f"all {limit} tokens of the context"
    refused = None if kv_type is None else model.refusal(kv_type)
    if refused is not None:
        raise YarnEdgeError(refused)
    types = [kv_type] if kv_type else [t for t in ("f16", "q8_0") if model.refusal(t) is None] or ["f16"]
    longest = {t: model.longest_context(budget_bytes, t, limit, weights=weights) for t in types}
    for chosen in types:
        if longest[chosen] == limit:
            reason = f"{told} fit into {gib(budget_bytes)} with a cache of {chosen}"
            if chosen != types[0]:
                reason += f" ({types[0]}: {longest[types[0]]})"
            return ContextChoice(limit, chosen, model.plan(limit, chosen, weights=weights), reason)
    n_ctx = longest[types[-1]]
    if n_ctx and not wanted_ctx:
        taken = gib(model.plan(limit, types[-1], weights=weights).taken_bytes)
        reason = f"{told} with a {types[-1]} cache would take {taken}, more than {gib(budget_bytes)}: {n_ctx} fit"
        return ContextChoice(n_ctx, types[-1], model.plan(n_ctx, types[-1], weights=weights), reason)
    raise DoesNotFitError(_why_not(model, budget_bytes, limit, types, weights))


def _why_not(model: Simulation, budget_bytes: int, limit: int, types: list[str], weights: Weights | None) -> str:
    types = [*types, *(t for t in ("q8_0", "q4_0") if t not in types and model.refusal(t) is None)]
    longest = {t: model.longest_context(budget_bytes, t, limit, weights=weights) for t in types}
    path = model.file.path
    if not any(longest.values()):
        least = model.plan(LEAST_CTX, types[-1], weights=weights)
        return (
            f"{path}: does not fit into {gib(budget_bytes)}: even {LEAST_CTX} tokens with a {types[-1]} cache take "
            f"{gib(least.taken_bytes)}, {gib(least.weights_bytes + least.repacked_bytes)} of them weights: take a smaller "
            "quantization or another machine"
        )
    told = ", ".join(f"{n_ctx} with {kv_type}" for kv_type, n_ctx in longest.items())
    return f"{path}: a context of {limit} tokens does not fit into {gib(budget_bytes)}; the longest are {told}"


def gib(n_bytes: float) -> str:
    """Bytes for people: "1.5 GiB", below 1 GiB "300 MiB"."""
    return f"{n_bytes / 2**30:.2f} GiB" if abs(n_bytes) >= 2**30 else f"{n_bytes / MIB:.0f} MiB"


def _last_that_fits(taken: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest n with taken(n) <= budget, between `low`, which fits, and `high`, which does not. Sizes are nearly linear."""
    for turn in range(64):
        if high - low <= 1:
            break
        share = (budget - taken(low)) / max(1, taken(high) - taken(low))
        guess = low + int(share * (high - low)) if turn < 6 else (low + high) // 2
        for n in (guess, guess + 1):
            if low < n < high:
                low, high = (n, high) if taken(n) <= budget else (low, n)
        if guess in (low, high):
            continue
        middle = (low + high) // 2
        if low < middle < high:
            low, high = (middle, high) if taken(middle) <= budget else (low, middle)
    return low
