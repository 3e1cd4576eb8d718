"""Types of weights and of the cache in one budget: of all that fit, the pair that is expected to lose least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from yarn_edge.convert.one_pass import SourceTensor
from yarn_edge.convert.sizing.allocate import choose_types, tensor_bytes
from yarn_edge.convert.sizing.sensitivity import TensorCost
from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.choice import DoesNotFitError, gib
from yarn_edge.memory.plan import Simulation
from yarn_edge.memory.weights import OUTPUT, copy_bytes
from yarn_edge.runtime.ggml_types import GGMLType

from .cache_loss import CacheLoss

POINTS = 24  # budgets along the frontier


@dataclass(frozen=True)
class Planned:
    """A choice of types. weights_nats, cache_nats: the KL that is expected of each, in nats for each token; memory_bytes: what runs,
    about.
    """

    types: Mapping[str, GGMLType]
    kv_type: str
    weights_nats: float
    cache_nats: float
    memory_bytes: int

    @property
    def nats(self) -> float:
        """Of weights and cache together."""
        return self.weights_nats + self.cache_nats


class Frontier:
    """What can be had for how much memory, with a context of `n_ctx` tokens.

    simulation: of a file of this model with the types `own`. tensors: those whose types are chosen, whose `costs` are known.
    """

    def __init__(
        self,
        simulation: Simulation,
        n_ctx: int,
        tensors: Sequence[SourceTensor],
        costs: Sequence[TensorCost],
        own: Mapping[str, GGMLType],
        losses: CacheLoss,
    ) -> None:
        self._costs, self._losses = costs, losses
        tied = OUTPUT not in simulation.file.tensors
        self._copies = {
            (t.name, kind): copy_bytes(t.name, t.ne, kind.name, tied)
            for t, cost in zip(tensors, costs, strict=True)
            for kind in {*cost.nats, own[t.name]}
        }
        held = sum(self.taken(cost, own[cost.name]) for cost in costs)
        self._others = {
            kv: simulation.plan(n_ctx, kv).taken_bytes - held
            for kv in losses.kv_types
            if simulation.refusal(kv) is None
        }

    def taken(self, cost: TensorCost, kind: GGMLType) -> int:
        """Memory of a tensor in a type: the mapped bytes, and the copy that the CPU's kernels are given of some."""
        return tensor_bytes(cost, kind) + self._copies.get((cost.name, kind), 0)

    def best(self, budget: int) -> Planned:
        """What is expected to lose least within `budget` bytes. Raises DoesNotFitError if nothing fits."""
        fitting = [planned for kv in self._others if (planned := self._with(kv, budget)) is not None]
        if not fitting:
            raise DoesNotFitError(
                f"nothing fits into {gib(budget)}: the smallest types and the smallest cache take {gib(self.least)}"
            )
        return min(fitting, key=lambda planned: planned.nats)

    @property
    def least(self) -> int:
        """The memory below which nothing fits."""
        return self._ends()[0]

    @property
    def most(self) -> int:
        """The memory beyond which nothing gets better."""
        return self._ends()[1]

    def points(self) -> list[Planned]:
        """The best for budgets from the least memory to the most that is of any use, evenly in its logarithm; each once."""
        least, most = self._ends()
        found: list[Planned] = []
        for i in range(POINTS):
            planned = self.best(round(least * (most / least) ** (i / (POINTS - 1))) + 1)
            if not found or planned.nats < found[-1].nats:
                found.append(planned)
        return found

    def _ends(self) -> tuple[int, int]:
        """(the memory of the smallest types with the smallest cache, of the largest with the largest)."""
        smallest, largest = (
            sum(pick(self.taken(cost, kind) for kind in cost.nats) for cost in self._costs) for pick in (min, max)
        )
        return smallest + min(self._others.values()), largest + max(self._others.values())

    def _with(self, kv_type: str, budget: int) -> Planned | None:
        """The best types beside a cache of this type."""
        try:
            types = choose_types(self._costs, budget - self._others[kv_type], self.taken)
        except YarnEdgeError:
            return None
        nats = sum(cost.nats[types[cost.name]] for cost in self._costs)
        memory = self._others[kv_type] + sum(self.taken(cost, types[cost.name]) for cost in self._costs)
        return Planned(types, kv_type, nats, self._losses.nats(kv_type), memory)
