"""The types of a file of a given size: each tensor's by what it costs in each (`sensitivity`), together the least that fit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import memory_size
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import GGMLType

from ..file_plan import FilePlan
from ..moments.gradients import Doubles, Gradients
from ..moments.moments import Moments
from ..one_pass import SourceTensor
from ..recipe import EMBEDDINGS, OUTPUT, QuantOptions
from .allocate import choose_types, tensor_bytes, tensor_ns
from .sensitivity import TensorCost, costs_of, kinds_for

_EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<part>gate|up|down)_exps\.weight")
_PADDING = 32  # bytes after a tensor, at most


@dataclass(frozen=True)
class SizeWanted:
    """The size of a file: in bytes, or in bits for each weight of its tensors."""

    n_bytes: int = 0
    bits_per_weight: float = 0.0

    def file_bytes(self, plan: FilePlan) -> int:
        """The size of the file in bytes."""
        return self.n_bytes or len(plan.layout.header) + int(self.bits_per_weight * plan.n_weights / 8)


def size_wanted(text: str) -> SizeWanted:
    """From 120MB, 2.5GiB or 4.5bpw. Raises YarnEdgeError."""
    bits = re.fullmatch(r"(\d+(?:\.\d+)?)\s*bpw", text.strip(), re.IGNORECASE)
    if bits is not None and 1 <= float(bits[1]) <= 32:
        return SizeWanted(bits_per_weight=float(bits[1]))
    try:
        if not text.strip()[-1:].isalpha():  # 4.5 is no size
            raise argparse.ArgumentTypeError("no unit")
        return SizeWanted(memory_size(text))
    except argparse.ArgumentTypeError:
        raise YarnEdgeError(
            f"--size {one_line(text, 40)}: expected bytes (120MB, 2.5GiB) or bits per weight (4.5bpw)"
        ) from None


@dataclass(frozen=True)
class SizePlan:
    """types: the chosen one of each tensor that has a choice; costs: what each costs in all; own: the types of --quant's recipe."""

    types: Mapping[str, GGMLType]
    costs: Sequence[TensorCost]
    own: Mapping[str, GGMLType]

    def nats(self, types: Mapping[str, GGMLType]) -> float:
        """What is lost with these types, in nats for each token; NaN if they were not all tried."""
        return sum(cost.nats.get(types[cost.name], np.nan) for cost in self.costs)

    @property
    def speed(self) -> float:
        """Of generating, relative to the recipe's types, as far as the time goes into these tensors."""
        return _total_ns(self.costs, self.own) / _total_ns(self.costs, self.types)


def best_types(costs: Sequence[TensorCost], own: Mapping[str, GGMLType], budget: int) -> dict[str, GGMLType]:
    """The types with the least loss in `budget` bytes that generate as fast as the types `own`; in a file that is larger than with
    those, as much slower as it is larger.
    """
    larger = budget / sum(tensor_bytes(cost, own[cost.name]) for cost in costs)
    return choose_types(costs, budget, most_ns=max(1.0, larger) * _total_ns(costs, own))


def _total_ns(costs: Sequence[TensorCost], types: Mapping[str, GGMLType]) -> float:
    return sum(tensor_ns(cost, types[cost.name]) for cost in costs)


def size_plan(
    wanted: SizeWanted,
    tensors: Sequence[SourceTensor],
    plan: FilePlan,
    moments: Moments,
    gradients: Gradients,
    kept: Path | None = None,
) -> SizePlan:
    """The chosen types and what they cost. plan: of the file with the recipe's own types. kept: see `costs_of`.

    Raises YarnEdgeError if no types fit into the size, and for a model of which some tensors' costs are not known.
    """
    free = free_tensors(tensors, plan)
    costs = measured_costs(free, plan, moments, gradients, kept)
    own = plan.recipe.types
    found = SizePlan(best_types(costs, own, wanted.file_bytes(plan) - _fixed_bytes(free, plan)), costs, own)
    before, after = found.nats(own), found.nats(found.types)
    note(
        f"types by sensitivity: {after:.3f} nats for each token are expected ({plan.quant.name}'s own types: {before:.3f}), "
        f"and {found.speed:.2f} of its speed on x86"
    )
    return found


def measured_costs(
    free: Sequence[SourceTensor], plan: FilePlan, moments: Moments, gradients: Gradients, kept: Path | None = None
) -> list[TensorCost]:
    """What each of the tensors `free` costs in each type; see `costs_of`."""
    return costs_of(free, moments, gradients, _rows_of(free, gradients), plan.kernels, kept)


def with_types(options: QuantOptions, chosen: Mapping[str, GGMLType]) -> QuantOptions:
    """The options that give each tensor its type: all of them, since where one is left to llama.cpp's recipe, it counts otherwise."""
    apart = {OUTPUT: "output_type", EMBEDDINGS[0]: "embedding_type"}
    others: dict[str, Any] = {field: chosen[name] for name, field in apart.items() if name in chosen}
    patterns = tuple((f"^{re.escape(name)}$", kind) for name, kind in chosen.items() if name not in apart)
    return replace(options, tensor_types=patterns, **others)


def check_types(chosen: Mapping[str, GGMLType], types: Mapping[str, GGMLType]) -> None:
    """Raise YarnEdgeError unless llama.cpp's recipe gave every tensor its chosen type."""
    for name, kind in chosen.items():
        if types[name] != kind:
            raise YarnEdgeError(
                f"--size: {name} was to be {kind.name}, but llama.cpp's recipe makes it {types[name].name}"
            )


def check_size(wanted: SizeWanted, tensors: Sequence[SourceTensor], plan: FilePlan) -> None:
    """Raise YarnEdgeError, before anything is measured, if no types can make this size."""
    free, size = free_tensors(tensors, plan), wanted.file_bytes(plan)
    least, most = (
        _fixed_bytes(free, plan)
        + sum(pick(t.n_rows * kind.row_bytes(t.width) for kind in kinds_for(t.width)) for t in free)
        for pick in (min, max)
    )
    if size < least:
        raise YarnEdgeError(
            f"--size: {size / 1e6:.1f} MB are wanted, but the file has {least / 1e6:.1f} MB with the smallest types (Q2_K, or Q4_0 where "
            "rows are no multiples of 256): choose a larger size"
        )
    if size > most:
        note(f"note: the largest type, Q8_0, makes {most / 1e6:.1f} MB: the file will be smaller than --size")


def free_tensors(tensors: Sequence[SourceTensor], plan: FilePlan) -> list[SourceTensor]:
    """The tensors whose types are chosen. Raises YarnEdgeError if there are none."""
    quantized = [t for t in tensors if not plan.recipe.types[t.name].is_float]
    if not quantized:
        raise YarnEdgeError(f"--size: {plan.quant.name} quantizes nothing: leave out --quant")
    return quantized


def _fixed_bytes(free: Sequence[SourceTensor], plan: FilePlan) -> int:
    """Bytes of the file that do not depend on the choice, and room for padding."""
    own = sum(t.n_rows * plan.recipe.types[t.name].row_bytes(t.width) for t in free)
    return plan.layout.file_bytes - own + _PADDING * len(free)


def _rows_of(tensors: Sequence[SourceTensor], gradients: Gradients) -> dict[str, Doubles]:
    """How much the rows of each tensor of a layer, of its experts, and of an output matrix of its own, matter."""
    found: dict[str, Doubles] = {}
    for tensor in tensors:
        _front, layers, rest = tensor.source.partition("layers.")
        if len(tensor.ne) == 3:
            rows = _experts_rows(tensor, gradients)
        else:
            rows = gradients.head if tensor.name == OUTPUT else gradients.rows.get(layers + rest)
        if rows is not None and rows.shape[-1] == tensor.rows_per_matrix:
            found[tensor.name] = rows if tensor.source_rows is None else rows[tensor.source_rows]
    return found


def _experts_rows(tensor: SourceTensor, gradients: Gradients) -> Doubles | None:
    """Those of experts, which transformers stacks, gate above up; None if it has them in another form."""
    _width, n_rows, n_experts = tensor.ne
    named = _EXPERTS.fullmatch(tensor.name)
    if named is None:
        return None
    own = f".experts.{'down' if named['part'] == 'down' else 'gate_up'}_proj"
    start = f"layers.{named['layer']}."
    rows = next((v for k, v in gradients.rows.items() if k.startswith(start) and k.endswith(own)), None)
    if rows is None or len(rows) != n_experts:
        return None
    part = {"gate": rows[:, :n_rows], "up": rows[:, n_rows:]}.get(named["part"], rows)
    return part if part.shape == (n_experts, n_rows) else None
