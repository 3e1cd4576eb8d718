"""What a model will take before it is loaded: weights, cache, buffers and process, in bytes, as llama.cpp itself reports.

llama.cpp can create a context without allocating memory (`Model(no_alloc=True)`), in about 10 ms, and logs the sizes that it
would need. So grouped heads, sliding windows, latent attention and recurrent states need no formulas here. What llama.cpp does
not report (the mapped file, repacked copies, the process) is measured or counted, each with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from yarn_edge.attention.kernel_shapes import work_bytes
from yarn_edge.attention.policy import choose_attention, last_contexts
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.memory.log_sizes import ContextSizes, allocated_bytes, context_sizes
from yarn_edge.memory.parts import DEVICE_FIRST_RUN_BYTES, PartPlan, fullest_share, split_parts, weights_by_device
from yarn_edge.memory.weights import Weights, weights_in_memory
from yarn_edge.runtime import ggml
from yarn_edge.runtime.context import MAX_DRAFT, Context
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.kv_cache import CTX_STEP
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.llama_api import captured_log, physical_threads
from yarn_edge.runtime.load_log import MIB
from yarn_edge.runtime.machine import resident_bytes
from yarn_edge.runtime.model import Model
from yarn_edge.runtime.recurrent import COPIES

LEAST_CTX = 512  # less is not a conversation
OUTPUTS = 1 + MAX_DRAFT  # tokens of a batch that can get logits in a conversation
# The bookkeeping of cells is allocated even in a simulation. Beyond this many tokens, sizes are extrapolated linearly.
MOST_SIMULATED = 2**20
_UNUSED = re.compile(r"model has unused tensor (\S+) ")
# llama-kv-cells.h: position 4, extension 12, shift 4, sequences 32 bytes; once used, two nodes of std::set of 48 bytes each.
_CELL_BYTES = 4 + 12 + 4 + 32 + 2 * 48
# Code of kernels and OpenMP, read from disk when it first runs, and what llama.cpp allocates with the first batch.
_FIRST_RUN_BYTES = 5 * MIB
# Numba and LLVM with our attention kernels, read from the cache: 124 MiB; compiling them once takes 45 MiB more.
FAST_BYTES = 125 * MIB


@dataclass(frozen=True)
class MemoryPlan:
    """What a model with one context takes at its peak, in bytes.

    weights: the mapped file, or all tensors on a device; repacked: the CPU's second copy of some weights; kv: the cache and
    recurrent states; compute: the written part of the graph's buffers; output: logits; process: Python, llama.cpp, the
    vocabulary, bookkeeping. device_bytes: the part of all these that is on a device, None if everything is on the CPU; of a split
    model, what of the budgets' sum its fullest device stands for. parts: of a split model, what each device takes.
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
    parts: tuple[PartPlan, ...] = ()

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        held = self.weights_bytes + self.repacked_bytes + self.kv_bytes
        return held + self.compute_bytes + self.output_bytes + self.process_bytes

    @property
    def taken_bytes(self) -> int:
        """What counts against a budget: everything on the CPU, or the part on the device."""
        return self.total_bytes if self.device_bytes is None else self.device_bytes


def conversation_settings(
    file: GGUFFile,
    n_ctx: int,
    kv_type: str,
    device: ggml.Device | LayerSplit | None,
    threads: int | None = None,
    attention: Attention = "auto",
) -> ContextSettings:
    """What `chat` and `serve` run: attention by the policy, logits for a token and its draft. device: None for the CPU."""
    wanted = ContextSettings(n_ctx=n_ctx, n_outputs=OUTPUTS, kv_type=kv_type, threads=threads, attention=attention)
    return choose_attention(wanted, file, on_cpu=device is None or device.kind == "cpu")


class Simulation:
    """A GGUF's header and vocabulary in llama.cpp, without weights. Use it as a context manager, or call `close`.

    device: where layers and cache would go, by default the CPU. attention: as in `yarn_edge.attention.policy`. budgets: of a split
    model, the bytes that may be used, by device.
    process_bytes: memory of a process that has loaded the header; by default measured in this process. gguf: as in `Model`.
    Raises YarnEdgeError if the file cannot be loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: ggml.Device | LayerSplit | None = None,
        threads: int | None = None,
        attention: Attention = "auto",
        process_bytes: int | None = None,
        gguf: GGUFFile | None = None,
        budgets: Mapping[str, int] | None = None,
    ) -> None:
        self.file: GGUFFile = gguf or read_gguf(path)
        if not self.file.tensors:
            raise YarnEdgeError(f"{path}: has a vocabulary but no weights: there is nothing to run")
        with captured_log() as log:
            self.model = Model(path, no_alloc=True, device=device, gguf=self.file)  # tokenizes, too
        self.device, self.budgets = self.model.device, budgets or {}
        self.threads, self.attention = threads or physical_threads(), attention
        self.n_ctx_train: int = self.model.n_ctx_train
        self._simulations: dict[ContextSettings, ContextSizes | YarnEdgeError] = {}
        self.process_bytes = process_bytes or 0  # with header and vocabulary
        self.unused = frozenset(m[1] for m in map(_UNUSED.search, log) if m)  # tensors that llama.cpp does not load
        try:
            self.weights = weights_in_memory(self.file, self.unused)
            split = self.device if isinstance(self.device, LayerSplit) else None
            self._weights_on = {} if split is None else weights_by_device(self.file, self.unused, split)
            self.plan(LEAST_CTX)  # the process is measured while there is little in it
        except BaseException:
            self.close()
            raise

    def settings(self, n_ctx: int, kv_type: str = "f16") -> ContextSettings:
        """The settings of a conversation with `n_ctx` tokens, which `plan` describes and which are to run."""
        return conversation_settings(self.file, n_ctx, kv_type, self.device, self.threads, self.attention)

    def plan(self, n_ctx: int, kv_type: str = "f16", *, weights: Weights | None = None) -> MemoryPlan:
        """The plan for a conversation: `plan_of` its `settings`."""
        return self.plan_of(self.settings(n_ctx, kv_type), weights)

    def plan_of(self, settings: ContextSettings, weights: Weights | None = None) -> MemoryPlan:
        """The plan for one context; settings.n_ctx must not be 0.

        weights: those of another file of the same model, such as a quantization that does not exist yet. Raises YarnEdgeError
        if llama.cpp cannot create the context (a cache type that the head size does not allow).
        """
        sizes = self._sizes(settings)
        weights = weights or self.weights
        n_ctx, kv_type = settings.n_ctx, settings.kv_type
        rows = min(settings.n_outputs or settings.n_batch, settings.n_batch, n_ctx)
        output = sizes.output * rows  # llama.cpp logs one row; the buffer grows when more are asked for
        process = self.process_bytes + sizes.cells * _CELL_BYTES + sizes.work + _FIRST_RUN_BYTES
        process += COPIES * sizes.recurrent
        if settings.fast:
            process += FAST_BYTES + work_bytes(self.file, settings)
        if isinstance(self.device, LayerSplit):
            parts = split_parts(self.device, self._weights_on, sizes, (output, process))
            fullest = fullest_share(parts, self.budgets)
            held = weights.tensors, 0, sizes.kv, sizes.compute
            return MemoryPlan(n_ctx, kv_type, *held, output, process, fullest, parts)
        if self.device is not None:
            on_device = weights.on_device + sizes.kv + sizes.on_device + DEVICE_FIRST_RUN_BYTES
            return MemoryPlan(n_ctx, kv_type, weights.tensors, 0, sizes.kv, sizes.compute, output, process, on_device)
        # Loading may be the peak: the whole file is mapped then, and there is no cache yet.
        later = sizes.kv + sizes.compute + output
        mapped = max(weights.mapped, weights.at_load - later)
        return MemoryPlan(n_ctx, kv_type, mapped, weights.repacked, sizes.kv, sizes.compute, output, process)

    def refusal(self, kv_type: str) -> str | None:
        """Why this model cannot have a cache of this type; None if it can."""
        try:
            self.plan(LEAST_CTX, kv_type)
        except YarnEdgeError as error:
            return str(error)
        return None

    def longest_context(self, budget_bytes: int, kv_type: str, limit: int, *, weights: Weights | None = None) -> int:
        """The longest context, up to `limit`, whose plan takes at most `budget_bytes` (on a device: of its memory).

        A multiple of CTX_STEP, unless it is `limit`. 0 if not even LEAST_CTX tokens fit.
        """

        def taken(n_ctx: int) -> int:
            return self.plan(n_ctx, kv_type, weights=weights).taken_bytes

        if taken(limit) <= budget_bytes:
            return limit
        # Sizes grow with the context, but fall where attention switches to smaller graphs.
        ends = last_contexts(self.file, limit)[:-1]
        begins = [LEAST_CTX, *(end + CTX_STEP for end in ends)]
        for begin, end in reversed(list(zip(begins, [*ends, limit], strict=True))):
            if begin > end or begin >= limit or taken(begin) > budget_bytes:
                continue
            if end < limit and taken(end) <= budget_bytes:
                return end
            last = -(-end // CTX_STEP)
            steps = _last_that_fits(lambda n: taken(min(n * CTX_STEP, limit)), begin // CTX_STEP, last, budget_bytes)
            return steps * CTX_STEP
        return 0

    def _sizes(self, settings: ContextSettings) -> ContextSizes:
        n_ctx = -(-settings.n_ctx // CTX_STEP) * CTX_STEP
        if n_ctx <= MOST_SIMULATED:
            return self._known(replace(settings, n_ctx=n_ctx))
        half = MOST_SIMULATED // 2
        near, far = (self._known(replace(settings, n_ctx=n)) for n in (half, MOST_SIMULATED))
        return far.beyond(near, (n_ctx - MOST_SIMULATED) / half)

    def _known(self, settings: ContextSettings) -> ContextSizes:
        if settings not in self._simulations:
            try:
                self._simulations[settings] = self._simulated(settings)
            except YarnEdgeError as error:
                self._simulations[settings] = error
        sizes = self._simulations[settings]
        if isinstance(sizes, YarnEdgeError):
            raise sizes
        return sizes

    def _simulated(self, settings: ContextSettings) -> ContextSizes:
        with captured_log() as lines, Context(self.model, settings) as context:
            log = "".join(lines)
            if not self.process_bytes:  # buffers that are allocated even here count by themselves
                self.process_bytes = max(MIB, resident_bytes() - allocated_bytes(log))
        return context_sizes(log, self.file, context.n_ubatch, self.threads, self.device)

    def close(self) -> None:
        """Free the header and the vocabulary."""
        self.model.close()

    def __enter__(self) -> Simulation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _last_that_fits(taken: Callable[[int], int], low: int, high: int, budget: int) -> int:
    """The largest n with taken(n) <= budget between `low`, which fits, and `high`, which does not. Sizes are nearly linear in n."""
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
