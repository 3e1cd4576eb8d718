"""Which context and which type of cache fit into a budget."""

from __future__ import annotations

from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.plan import LEAST_CTX, MemoryPlan, Simulation
from yarn_edge.memory.weights import Weights
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.load_log import MIB


@dataclass(frozen=True)
class ContextChoice:
    """A context and a cache type that fit, their plan, and the reason for them. settings: what is to run."""

    settings: ContextSettings
    plan: MemoryPlan
    reason: str

    @property
    def n_ctx(self) -> int:
        """Tokens of the context."""
        return self.settings.n_ctx

    @property
    def kv_type(self) -> str:
        """The type of the cache."""
        return self.settings.kv_type


class DoesNotFitError(YarnEdgeError):
    """The model, or the requested context, takes more memory than there is."""


def choose_context(
    model: Simulation,
    budget_bytes: int,
    wanted_ctx: int | None,
    kv_type: str | None = None,
    *,
    weights: Weights | None = None,
) -> ContextChoice:
    """A context and a cache type within `budget_bytes` (of the device that the simulation is for).

    wanted_ctx: the requested context; None for the context that the model was trained for, or for less if that does not fit.
    kv_type: None for f16 if that fits, else q8_0, which costs next to no quality. A context is shortened only if none was
    requested, and then with the last type that was tried. Raises DoesNotFitError, which names the longest contexts, if the
    request does not fit or nothing fits, and YarnEdgeError if the model cannot have a cache of the requested type.
    """
    limit = wanted_ctx or model.n_ctx_train
    whole = f"{limit} tokens" if wanted_ctx else f"all {limit} tokens of the context"
    refused = None if kv_type is None else model.refusal(kv_type)
    if refused is not None:
        raise YarnEdgeError(refused)
    types = [kv_type] if kv_type else [t for t in ("f16", "q8_0") if model.refusal(t) is None] or ["f16"]
    longest = {t: model.longest_context(budget_bytes, t, limit, weights=weights) for t in types}
    for chosen in types:
        if longest[chosen] == limit:
            reason = f"{whole} fit into {gib(budget_bytes)} with a cache of type {chosen}"
            if chosen != types[0]:
                reason += f" ({types[0]}: {longest[types[0]]}){_speed(model, limit, chosen)}"
            return _choice(model, limit, chosen, weights, reason)
    n_ctx = longest[types[-1]]
    if n_ctx and not wanted_ctx:
        taken = gib(model.plan(limit, types[-1], weights=weights).taken_bytes)
        reason = (
            f"{whole} with a cache of type {types[-1]} would take {taken}, more than {gib(budget_bytes)}: {n_ctx} fit"
        )
        if len(types) > 1:
            reason += f" ({types[0]}: {longest[types[0]]}){_speed(model, n_ctx, types[-1])}"
        return _choice(model, n_ctx, types[-1], weights, reason)
    raise DoesNotFitError(_why_not(model, budget_bytes, limit, types, weights))


def _speed(model: Simulation, n_ctx: int, kv_type: str) -> str:
    """What the smaller cache costs on a CPU, in a few words. GPUs read both types fast."""
    if model.device is not None:
        return ""
    if model.settings(n_ctx, kv_type).fast:
        return f"; with our attention {kv_type} generates about as fast"
    return f"; llama.cpp's attention is slower with {kv_type}"


def _choice(model: Simulation, n_ctx: int, kv_type: str, weights: Weights | None, reason: str) -> ContextChoice:
    return ContextChoice(model.settings(n_ctx, kv_type), model.plan(n_ctx, kv_type, weights=weights), reason)


def _why_not(model: Simulation, budget_bytes: int, limit: int, types: list[str], weights: Weights | None) -> str:
    types = [*types, *(t for t in ("q8_0", "q4_0") if t not in types and model.refusal(t) is None)]
    longest = {t: model.longest_context(budget_bytes, t, limit, weights=weights) for t in types}
    path = model.file.path
    if not any(longest.values()):
        least = model.plan(LEAST_CTX, types[-1], weights=weights)
        return (
            f"{path}: does not fit into {gib(budget_bytes)}: even {LEAST_CTX} tokens with a cache of type {types[-1]} take "
            f"{gib(least.taken_bytes)}, {gib(least.weights_bytes + least.repacked_bytes)} of them weights: take a smaller "
            "quantization or another machine"
        )
    contexts = ", ".join(f"{n_ctx} with {kv_type}" for kv_type, n_ctx in longest.items())
    return f"{path}: a context of {limit} tokens does not fit into {gib(budget_bytes)}; the longest are {contexts}"


def gib(n_bytes: float) -> str:
    """Bytes for people: "1.50 GiB"; below 1 GiB "300 MiB"."""
    return f"{n_bytes / 2**30:.2f} GiB" if abs(n_bytes) >= 2**30 else f"{n_bytes / MIB:.0f} MiB"
