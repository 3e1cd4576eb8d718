"""The search behind `fit`: what every candidate takes, which of them is recommended and why, on which device it would fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from yarn_edge import ggml
from yarn_edge.backends import BACKENDS
from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory import available_bytes
from yarn_edge.memory_plan import LEAST_CTX, Choice, DoesNotFitError, MemoryPlan, Simulation, choose
from yarn_edge.progress import bar, note
from yarn_edge.repack import weights_of

from .fit_accuracy import in_a_process
from .fit_candidates import Candidate, Found, candidates
from .fit_speed import Speed

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
class DeviceFit:
    """Whether all of the recommended plan fits on a device. needed_bytes: None where that is not known; told: why."""

    device: ggml.Device
    free_bytes: int
    needed_bytes: int | None
    told: str = ""

    @property
    def fits(self) -> bool:
        """All layers and the cache."""
        return self.needed_bytes is not None and self.needed_bytes <= self.free_bytes


@dataclass(frozen=True)
class Fit:
    """The whole answer. choice is None where nothing fits; why: the reason; command: lines to paste, each as its words.

    most_ctx: the longest context that was looked at; shown: the quantization of `curves`, cache type -> (tokens, bytes).
    """

    model: Path
    budget_bytes: int
    budget_told: str
    most_ctx: int
    rows: tuple[Row, ...]
    candidate: Candidate | None
    choice: Choice | None
    why: str
    command: tuple[tuple[str, ...], ...]
    devices: tuple[DeviceFit, ...]
    tok_per_s: float | None
    shown: str
    curves: dict[str, list[tuple[int, int]]]


def fit(
    model: Path,
    speed: Speed,
    *,
    memory: int | None = None,
    ctx: int | None = None,
    threads: int | None = None,
    with_curves: bool = True,
) -> Fit:
    """The answer for a GGUF or a checkpoint folder. memory: bytes, None for what is free. Raises YarnEdgeError.

    with_curves: also memory by context, for a picture.
    """
    budget = memory if memory is not None else available_bytes()
    if budget is None:
        raise YarnEdgeError("this system does not tell how much memory is free: give it with --memory, such as 16GiB")
    with candidates(model) as known, bar("Simulating", 1):
        with _simulation(known, threads) as simulation:
            files = [*([] if known.own is None else [known.own]), *known.plan()]
            found = [replace(c, weights=weights_of(c.file, simulation.unused)) for c in files]
            trained = simulation.n_ctx_train
            if ctx is not None and ctx > trained:
                note(f"warning: --ctx {ctx} is beyond the {trained} tokens that the model was made for")
            most = max(ctx or 0, trained)
            rows = _rows(simulation, found, budget, most)
            candidate, choice, why = _recommended(simulation, found, budget, ctx)
            shown = candidate or found[-1]
            curves = _curves(simulation, shown, most) if with_curves else {}
        devices = _devices(shown, choice)
        rows = [
            replace(r, tok_per_s=speed.tok_per_s(r.candidate.file, r.longest_ctx, r.kv_type)) if r.plan else r
            for r in rows
        ]
        at_most = speed.tok_per_s(candidate.file, choice.n_ctx, choice.kv_type) if candidate and choice else None
    told = "given" if memory is not None else "free now"
    command = _command(model, candidate, choice, devices) if candidate and choice else ()
    return Fit(
        model,
        budget,
        told,
        most,
        tuple(rows),
        candidate,
        choice,
        why,
        command,
        tuple(devices),
        at_most,
        shown.quant,
        curves,
    )


def _simulation(known: Found, threads: int | None) -> Simulation:
    """Of the file that is there, before anything is planned in this process; else of a planned one, its process apart."""
    if known.own is not None:
        return Simulation(known.own.file.path, threads=threads)
    path = known.plan()[0].file.path
    apart = in_a_process(_process_bytes, path, LEAST_CTX, "f16", threads)["process_bytes"]
    return Simulation(path, threads=threads, process_bytes=apart)


def _process_bytes(path: Path, _n_ctx: int, _kv_type: str, threads: int | None) -> dict[str, int]:
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
) -> tuple[Candidate | None, Choice | None, str]:
    """The best quantization that holds all of the context; else the smallest that is not a last resort; else that one.

    Nothing is taken silently: the third is the reason, or what the least would be.
    """
    limit = ctx or simulation.n_ctx_train
    passed, shorter, refusals = [], [], []
    for candidate in (c for c in found if c.recommended):
        try:
            choice = choose(simulation, budget, ctx, weights=candidate.weights)
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


def _why(candidate: Candidate, choice: Choice, passed: Sequence[str]) -> str:
    better = f"; not with {', '.join(passed)}" if passed else ""
    return f"{candidate.quant}: {choice.reason}{better}"


def _command(
    model: Path, candidate: Candidate, choice: Choice, devices: Sequence[DeviceFit]
) -> tuple[tuple[str, ...], ...]:
    lines: list[tuple[str, ...]] = []
    run = str(model)
    if candidate.verb is not None:
        name = model.resolve().name if model.is_dir() else model.stem
        run = f"{name}-{candidate.quant}.gguf"
        lines.append(("yarn-edge", candidate.verb, str(model), "-o", run, "--quant", candidate.quant))
    words = ("yarn-edge", "chat", run, "--ctx", str(choice.n_ctx), "--kv-type", choice.kv_type)
    backend = next((name for d in devices if d.fits for name, own in BACKENDS.items() if d.device.backend in own), None)
    return (*lines, (*words, "--backend", backend) if backend else words)


def _devices(candidate: Candidate, choice: Choice | None) -> list[DeviceFit]:
    """Every GPU: whether all layers and the cache of the recommended context fit on it."""
    found = []
    for device in (d for d in ggml.devices() if d.kind in ("gpu", "igpu")):
        free, _total = ggml.device_memory(device)
        if choice is None:
            found.append(DeviceFit(device, free, None, "nothing is recommended"))
            continue
        try:
            with Simulation(candidate.file.path, device=device) as simulation:
                needed = simulation.plan(choice.n_ctx, choice.kv_type).device_bytes
            found.append(DeviceFit(device, free, needed))
        except YarnEdgeError as error:
            found.append(DeviceFit(device, free, None, str(error)))
    return found


def _curves(simulation: Simulation, candidate: Candidate, limit: int) -> dict[str, list[tuple[int, int]]]:
    """Cache type -> (context, bytes in all), for the picture."""
    lengths = sorted({min(limit, 512 << step) for step in range(31)} | {limit})
    return {
        kv_type: [(n, simulation.plan(n, kv_type, weights=candidate.weights).total_bytes) for n in lengths]
        for kv_type in CACHE_TYPES
        if simulation.refusal(kv_type) is None
    }
