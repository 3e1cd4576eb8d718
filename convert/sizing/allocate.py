"""The types that make the least loss in a given number of bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml_types import GGMLType

from .sensitivity import TensorCost


def tensor_bytes(cost: TensorCost, kind: GGMLType) -> int:
    """The size of the tensor in a type."""
    return cost.n_weights // kind.block * kind.block_bytes


Sized = Callable[[TensorCost, GGMLType], int]


def choose_types(costs: Sequence[TensorCost], budget: int, sized: Sized = tensor_bytes) -> dict[str, GGMLType]:
    """A type for each tensor, with the least sum of nats whose bytes fit into `budget`. sized: the bytes of a tensor in a type.

    Starts from the smallest types and takes, again and again, the step that saves most nats for each byte and still fits; steps lead
    along the lower convex hull of each tensor's types, so that this is the best there is but for the last step. Raises YarnEdgeError
    if not even the smallest types fit.
    """
    hulls = [_hull(cost, sized) for cost in costs]
    at = [0] * len(costs)
    spent = sum(sized(cost, hull[0]) for cost, hull in zip(costs, hulls, strict=True))
    if spent > budget:
        raise YarnEdgeError(
            f"the smallest types need {spent / 1e6:.1f} MB, but {budget / 1e6:.1f} MB are left for them"
        )
    steps = sorted(
        (-_gain(costs[i], hull[k], hull[k + 1], sized), i, k)
        for i, hull in enumerate(hulls)
        for k in range(len(hull) - 1)
    )
    for _, i, k in steps:
        more = sized(costs[i], hulls[i][k + 1]) - sized(costs[i], hulls[i][k])
        if at[i] == k and spent + more <= budget:
            at[i], spent = k + 1, spent + more
    return {cost.name: hull[k] for cost, hull, k in zip(costs, hulls, at, strict=True)}


def _gain(cost: TensorCost, small: GGMLType, large: GGMLType, sized: Sized) -> float:
    """Nats saved for each byte."""
    return (cost.nats[small] - cost.nats[large]) / (sized(cost, large) - sized(cost, small))


def _hull(cost: TensorCost, sized: Sized) -> list[GGMLType]:
    """The types on the lower convex hull of nats over bytes, from the smallest on."""
    hull: list[GGMLType] = []
    for kind in sorted(cost.nats, key=lambda kind: (sized(cost, kind), cost.nats[kind])):
        if hull and cost.nats[kind] >= cost.nats[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(cost, hull[-2], hull[-1], sized) <= _gain(cost, hull[-1], kind, sized):
            hull.pop()
        hull.append(kind)
    return hull
