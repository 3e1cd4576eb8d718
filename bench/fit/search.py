"""The search behind `fit`: the memory of every candidate on each device, which one is recommended there, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yarn_edge.memory.choice import ContextChoice, DoesNotFitError, choose_context
from yarn_edge.memory.placement import ENOUGH_CTX, budget_bytes, device_places
from yarn_edge.memory.plan import LEAST_CTX, MemoryPlan, Simulation
from yarn_edge.memory.weights import weights_in_memory
from yarn_edge.progress import bar, note
from yarn_edge.runtime import ggml
from yarn_edge.runtime.devices import backend_of
from yarn_edge.runtime.layer_split import LayerSplit

from .candidates import Candidate, Candidates, fit_candidates
from .fresh_process import in_a_process
from .speed import Speed

CACHE_TYPES = ("f16", "q8_0", "q4_0")
LEAST_USEFUL = 4096  # tokens; below, a smaller quantization is better than a shorter context


@dataclass(frozen=True)
class Row:
    """One quantization with one cache type. longest_ctx: 0 if not even the shortest fits; refused: why there is no such cache."""

    candidate: Candidate
    kv_type: str
    longest_ctx: int = 0
    plan: MemoryPlan | None = None
    tok_per_s: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class PlaceFit:
    """What fits on one device (None: the CPU). candidate and choice: the recommendation, None if nothing fits; why: the reason.

    tok_per_s: upper bound for the choice. shown: the quantization of `curves`, which map cache types to (tokens, bytes).
    """

    device: ggml.Device | None
    budget_bytes: int
    rows: tuple[Row, ...]
    candidate: Candidate | None
    choice: ContextChoice | None
    why: str
    tok_per_s: float | None
    shown: str
    curves: dict[str, list[tuple[int, int]]]

    @property
    def name(self) -> str:
        """ "CPU", or the device's own name."""
        return "CPU" if self.device is None else self.device.name


@dataclass(frozen=True)
class Fit:
    """The whole result. chosen: the recommended one of `places`; command: command lines to paste, each as a tuple of words.

    most_ctx: the longest context considered. given: whether the user gave the budget.
    """

    model: Path
    given: bool
    most_ctx: int
    places: tuple[PlaceFit, ...]
    chosen: PlaceFit
    command: tuple[tuple[str, ...], ...]


def fit(
    model: Path,
    speed: Speed,
    *,
    memory: int | None = None,
    ctx: int | None = None,
    backend: str | None = None,
    threads: int | None = None,
    with_curves: bool = True,
) -> Fit:
    """What fits of a GGUF or a checkpoint folder. memory: bytes, None for what is free. Raises YarnEdgeError.

    with_curves: include memory by context, for a picture.
    """
    with fit_candidates(model) as known, bar("Simulating", 1):
        places = []
        for device in device_places(backend):
            with _simulation(known, device, threads) as simulation:
                budget = budget_bytes(device, backend, memory)
                places.append(_fit_on(simulation, known, speed, budget, ctx, with_curves))
                trained = simulation.n_ctx_train
    if ctx is not None and ctx > trained:
        note(f"warning: --ctx {ctx} exceeds the {trained} tokens that the model was trained for")
    enough = min(ctx or trained, ENOUGH_CTX)
    chosen = next((p for p in places[:-1] if p.choice is not None and p.choice.n_ctx >= enough), places[-1])
    return Fit(model, memory is not None, max(ctx or 0, trained), tuple(places), chosen, _command(model, chosen))


def _fit_on(
    simulation: Simulation, known: Candidates, speed: Speed, budget: int, ctx: int | None, with_curves: bool
) -> PlaceFit:
    files = [*([] if known.own is None else [known.own]), *known.plan()]
    candidates = [replace(c, weights=weights_in_memory(c.file, simulation.unused)) for c in files]
    most = max(ctx or 0, simulation.n_ctx_train)
    device = simulation.device
    assert not isinstance(device, LayerSplit)
    candidate, choice, why = _recommended(simulation, candidates, budget, ctx)
    shown = candidate or candidates[-1]

    def at_most(of: Candidate, n_ctx: int, kv_type: str) -> float | None:
        """None on a GPU, whose memory bandwidth is not measured."""
        return speed.tok_per_s(of.file, n_ctx, kv_type) if simulation.device is None else None

    rows = [
        replace(row, tok_per_s=at_most(row.candidate, row.longest_ctx, row.kv_type)) if row.plan else row
        for row in _rows(simulation, candidates, budget, most)
    ]
    return PlaceFit(
        device,
        budget,
        tuple(rows),
        candidate,
        choice,
        why,
        at_most(candidate, choice.n_ctx, choice.kv_type) if candidate and choice else None,
        shown.quant,
        _curves(simulation, shown, most) if with_curves else {},
    )


def _simulation(known: Candidates, device: ggml.Device | None, threads: int | None) -> Simulation:
    """Of the existing file, before anything is planned in this process; else of a planned file, with its process measured apart."""
    if known.own is not None:
        return Simulation(known.own.file.path, device=device, threads=threads, gguf=known.own.file)
    path = known.plan()[0].file.path
    return Simulation(path, device=device, threads=threads, process_bytes=process_bytes_apart(path, threads))


def process_bytes_apart(path: Path, threads: int | None) -> int:
    """What a process takes that has loaded the header of `path`, and nothing else that this one may have."""
    return in_a_process(_process_bytes, path, LEAST_CTX, "f16", threads)["process_bytes"]


def _process_bytes(path: Path, _n_ctx: int, _kv_type: str, threads: int | None, _backend: str) -> dict[str, int]:
    with Simulation(path, threads=threads) as simulation:
        return {"process_bytes": simulation.process_bytes}


def _rows(simulation: Simulation, candidates: Sequence[Candidate], budget: int, most: int) -> list[Row]:
    rows = []
    for candidate in candidates:
        for kv_type in CACHE_TYPES:
            refused = simulation.refusal(kv_type)
            if refused is not None:
                rows.append(Row(candidate, kv_type, refused=refused.rpartition(": ")[2]))
                continue
            longest = simulation.longest_context(budget, kv_type, most, weights=candidate.weights)
            plan = simulation.plan(longest, kv_type, weights=candidate.weights) if longest else None
            rows.append(Row(candidate, kv_type, longest, plan))
    return rows


def _recommended(
    simulation: Simulation, candidates: Sequence[Candidate], budget: int, ctx: int | None
) -> tuple[Candidate | None, ContextChoice | None, str]:
    """(candidate, choice, reason): the best quantization that holds the whole context; else the smallest one that fits.

    A last resort is taken only if nothing else fits. If nothing fits at all, the reason says what the least would take.
    """
    limit = ctx or simulation.n_ctx_train
    passed, shorter, refusals = [], [], []
    for candidate in (c for c in candidates if c.recommended):
        try:
            choice = choose_context(simulation, budget, ctx, weights=candidate.weights)
        except DoesNotFitError as error:
            passed.append(candidate.quant)
            refusals.append(f"{candidate.quant}: {error}")
            continue
        if choice.n_ctx == limit and (ctx is not None or not candidate.last_resort):
            return candidate, choice, _why(candidate, choice, passed)
        passed.append(candidate.quant)
        shorter.append((candidate, choice))
    if not shorter:
        return None, None, refusals[-1]
    useful = [pair for pair in shorter if pair[1].n_ctx >= min(limit, LEAST_USEFUL)] or shorter[-1:]
    candidate, choice = ([pair for pair in useful if not pair[0].last_resort] or useful)[-1]
    return candidate, choice, _why(candidate, choice, [])


def _why(candidate: Candidate, choice: ContextChoice, passed: Sequence[str]) -> str:
    better = f"; not with {', '.join(passed)}" if passed else ""
    return f"{candidate.quant}: {choice.reason}{better}"


def _command(model: Path, chosen: PlaceFit) -> tuple[tuple[str, ...], ...]:
    candidate, choice = chosen.candidate, chosen.choice
    if candidate is None or choice is None:
        return ()
    lines: list[tuple[str, ...]] = []
    run = str(model)
    if candidate.verb is not None:
        name = model.resolve().name if model.is_dir() else model.stem
        run = f"{name}-{candidate.quant}.gguf"
        lines.append(("yarn-edge", candidate.verb, str(model), "-o", run, "--quant", candidate.quant))
    words = ("yarn-edge", "chat", run, "--ctx", str(choice.n_ctx), "--kv-type", choice.kv_type)
    return (*lines, words if chosen.device is None else (*words, "--backend", backend_of(chosen.device)))


def _curves(simulation: Simulation, candidate: Candidate, limit: int) -> dict[str, list[tuple[int, int]]]:
    """Cache type -> (context, bytes that count against the budget), for the picture."""

    def taken(n_ctx: int, kv_type: str) -> int:
        return simulation.plan(n_ctx, kv_type, weights=candidate.weights).taken_bytes

    lengths = sorted({min(limit, 512 << step) for step in range(31)} | {limit})
    return {
        kv_type: [(n, taken(n, kv_type)) for n in lengths]
        for kv_type in CACHE_TYPES
        if simulation.refusal(kv_type) is None
    }
