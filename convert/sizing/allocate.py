"""The types that make the least loss in a given number of bytes, and in a given time for each generated token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.ggml_types import GGMLType

from .decode_time import decode_ns
from .sensitivity import TensorCost


def tensor_bytes(cost: TensorCost, kind: GGMLType) -> int:
    """The size of the tensor in a type."""
    return cost.n_weights // kind.block * kind.block_bytes


Sized = Callable[[TensorCost, GGMLType], int]
Price = Callable[[TensorCost, GGMLType], float]
# What all the time may cost, relative to all the bytes: the best of the choices at these prices is taken.
_TIME_PRICES = (0.0, *(2.0 ** (k / 2) for k in range(-20, 9)))


def tensor_ns(cost: TensorCost, kind: GGMLType) -> float:
    """The time that a generated token spends on the tensor in a type, on x86 (`decode_time`)."""
    return decode_ns(cost.n_used, kind)


def choose_types(
    costs: Sequence[TensorCost], budget: int, sized: Sized = tensor_bytes, most_ns: float = math.inf
) -> dict[str, GGMLType]:
    """A type for each tensor, with the least sum of nats whose bytes fit into `budget`, and whose time into `most_ns` if any types do.

    sized: the bytes of a tensor in a type. Raises YarnEdgeError if not even the smallest types fit.
    """
    smallest = {cost.name: min(cost.nats, key=lambda kind, cost=cost: sized(cost, kind)) for cost in costs}  # type: ignore[misc]
    least = sum(sized(cost, smallest[cost.name]) for cost in costs)
    if least > budget:
        raise YarnEdgeError(
            f"the smallest types need {least / 1e6:.1f} MB, but {budget / 1e6:.1f} MB are left for them"
        )
    fastest = sum(tensor_ns(cost, smallest[cost.name]) for cost in costs)  # the smallest types are the fastest
    most_ns = max(most_ns, fastest)

    def chosen(price_of_time: float, limit: float) -> dict[str, GGMLType]:
        def price(cost: TensorCost, kind: GGMLType) -> float:
            time = tensor_ns(cost, kind) / most_ns if price_of_time else 0.0
            return sized(cost, kind) / budget + price_of_time * time

        return _filled(costs, (budget, limit), sized, price)

    if math.isinf(most_ns):
        return chosen(0.0, math.inf)
    choices = [chosen(price_of_time, limit) for price_of_time in _TIME_PRICES for limit in (math.inf, most_ns)]
    fast = [types for types in choices if sum(tensor_ns(cost, types[cost.name]) for cost in costs) <= most_ns]
    return min(fast, key=lambda types: sum(cost.nats[types[cost.name]] for cost in costs))


def _filled(costs: Sequence[TensorCost], limits: tuple[int, float], sized: Sized, price: Price) -> dict[str, GGMLType]:
    """Starts from the smallest types and takes, again and again, the step that saves most nats for its price and stays within the limits
    of bytes and time. Steps lead along the lower convex hull of each tensor's types, so that without a limit of time this is the
    best there is but for the last step.
    """
    hulls = [_hull(cost, price) for cost in costs]
    taken = [
        [(sized(cost, kind), tensor_ns(cost, kind)) for kind in hull] for cost, hull in zip(costs, hulls, strict=True)
    ]
    at = [0] * len(costs)
    n_bytes, ns = sum(row[0][0] for row in taken), sum(row[0][1] for row in taken)
    steps = sorted(
        (-_gain(costs[i], hull[k], hull[k + 1], price), i, k)
        for i, hull in enumerate(hulls)
        for k in range(len(hull) - 1)
    )
    for _, i, k in steps:
        more, longer = (after - before for before, after in zip(*taken[i][k : k + 2], strict=True))
        if at[i] == k and n_bytes + more <= limits[0] and ns + longer <= limits[1]:
            at[i], n_bytes, ns = k + 1, n_bytes + more, ns + longer
    return {cost.name: hull[k] for cost, hull, k in zip(costs, hulls, at, strict=True)}


def _gain(cost: TensorCost, small: GGMLType, large: GGMLType, price: Price) -> float:
    """Nats saved for the price."""
    return (cost.nats[small] - cost.nats[large]) / (price(cost, large) - price(cost, small))


def _hull(cost: TensorCost, price: Price) -> list[GGMLType]:
    """The types on the lower convex hull of nats over price, from the lowest on."""
    hull: list[GGMLType] = []
    for kind in sorted(cost.nats, key=lambda kind: (price(cost, kind), cost.nats[kind])):
        if hull and cost.nats[kind] >= cost.nats[hull[-1]]:
            continue
        while len(hull) > 1 and _gain(cost, hull[-2], hull[-1], price) <= _gain(cost, hull[-1], kind, price):
            hull.pop()
        hull.append(kind)
    return hull
