"""The search behind `fit`: what every candidate takes on each device, which of them is recommended where, and why."""

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

from .accuracy import in_a_process
from .candidates import Candidate, Found, fit_candidates
from .speed import Speed

CACHE_TYPES = ("f16", "q8_0", "q4_0")
LEAST_USEFUL = 4096  # tokens below which a smaller quantization is better than a shorter context


@dataclass(frozen=True)
class Row:
    """One quantization with one cache type. longest_ctx: 0 where not even the least fits; refused: why there is none."""

    candidate: Candidate
    kv_type: str
    longest_ctx: int = 0
    plan: MemoryPlan | None = None
    tok_per_s: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class PlaceFit:
    """What fits on one device (None: the CPU). choice is None where nothing fits; why: the reason.

    tok_per_s: of the choice, at most. curves: of the candidate that is shown, cache type -> (tokens, bytes).
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
    """The whole answer. chosen: the place that is recommended, one of `device_places`; command: lines to paste, each as its words.

    most_ctx: the longest context that was looked at; given: whether the budget was.
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
    """The answer for a GGUF or a checkpoint folder. memory: bytes, None for what is free. Raises YarnEdgeError.

    with_curves: also memory by context, for a picture.
    """
    with fit_candidates(model) as known, bar("Simulating", 1):
        found = []
        for device in device_places(backend):
            with _simulation(known, device, threads) as simulation:
                budget = budget_bytes(device, backend, memory)
                found.append(_fit_on(simulation, known, speed, budget, ctx, with_curves))
                trained = simulation.n_ctx_train
    if ctx is not None and ctx > trained:
        note(f"warning: --ctx {ctx} is beyond the {trained} tokens that the model was made for")
    enough = min(ctx or trained, ENOUGH_CTX)
    chosen = next((p for p in found[:-1] if p.choice is not None and p.choice.n_ctx >= enough), found[-1])
    return Fit(model, memory is not None, max(ctx or 0, trained), tuple(found), chosen, _command(model, chosen))


def _fit_on(
    simulation: Simulation, known: Found, speed: Speed, budget: int, ctx: int | None, with_curves: bool
) -> PlaceFit:
    files = [*([] if known.own is None else [known.own]), *known.plan()]
    found = [replace(c, weights=weights_in_memory(c.file, simulation.unused)) for c in files]
    most = max(ctx or 0, simulation.n_ctx_train)
    candidate, choice, why = _recommended(simulation, found, budget, ctx)
    shown = candidate or found[-1]

    def at_most(of: Candidate, n_ctx: int, kv_type: str) -> float | None:
        """Of a GPU's memory the bandwidth is not measured."""
        return speed.tok_per_s(of.file, n_ctx, kv_type) if simulation.device is None else None

    rows = [
        replace(row, tok_per_s=at_most(row.candidate, row.longest_ctx, row.kv_type)) if row.plan else row
        for row in _rows(simulation, found, budget, most)
    ]
    return PlaceFit(
        simulation.device,
        budget,
        tuple(rows),
        candidate,
        choice,
        why,
        at_most(candidate, choice.n_ctx, choice.kv_type) if candidate and choice else None,
        shown.quant,
        _curves(simulation, shown, most) if with_curves else {},
    )


def _simulation(known: Found, device: ggml.Device | None, threads: int | None) -> Simulation:
    """Of the file that is there, before anything is planned in this process; else of a planned one, its process apart."""
    if known.own is not None:
        return Simulation(known.own.file.path, device=device, threads=threads, gguf=known.own.file)
    path = known.plan()[0].file.path
    apart = in_a_process(_process_bytes, path, LEAST_CTX, "f16", threads)["process_bytes"]
    return Simulation(path, device=device, threads=threads, process_bytes=apart)


def _process_bytes(path: Path, _n_ctx: int, _kv_type: str, threads: int | None, _backend: str) -> dict[str, int]:
    with Simulation(path, threads=threads) as simulation:
        return {"process_bytes": simulation.process_bytes}


def _rows(simulation: Simulation, found: Sequence[Candidate], budget: int, most: int) -> list[Row]:
    rows = []
    for candidate in found:
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
    simulation: Simulation, found: Sequence[Candidate], budget: int, ctx: int | None
) -> tuple[Candidate | None, ContextChoice | None, str]:
    """The best quantization that holds all of the context; else the smallest that is not a last resort; else that one.

    Nothing is taken silently: the third is the reason, or what the least would be.
    """
    limit = ctx or simulation.n_ctx_train
    passed, shorter, refusals = [], [], []
    for candidate in (c for c in found if c.recommended):
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
    """Cache type -> (context, bytes in all, on a device: there), for the picture."""

    def taken(n_ctx: int, kv_type: str) -> int:
        return simulation.plan(n_ctx, kv_type, weights=candidate.weights).taken_bytes

    lengths = sorted({min(limit, 512 << step) for step in range(31)} | {limit})
    return {
        kv_type: [(n, taken(n, kv_type)) for n in lengths]
        for kv_type in CACHE_TYPES
        if simulation.refusal(kv_type) is None
    }
