"""The types of a file of a given size: each tensor's by what it costs in each (`sensitivity`), together the least that fit."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import memory_size
from yarn_edge.progress import note

from ..file_plan import FilePlan
from ..moments.gradients import Doubles, Gradients, output_gradients
from ..moments.moments import Moments
from ..one_pass import SourceTensor
from ..recipe import EMBEDDINGS, OUTPUT
from .allocate import choose_types, tensor_bytes
from .sensitivity import costs_of

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
        return SizeWanted(memory_size(text))
    except argparse.ArgumentTypeError:
        raise YarnEdgeError(
            f"--size {one_line(text, 40)}: expected bytes (120MB, 2.5GiB) or bits per weight (4.5bpw)"
        ) from None


def types_for(
    wanted: SizeWanted, tensors: Sequence[SourceTensor], plan: FilePlan, moments: Moments, checkpoint: Path
) -> dict[str, Any]:
    """Fields of `QuantOptions` with the chosen types. plan: of the file with the recipe's own types.

    Raises YarnEdgeError if no types fit into the size, and for a model of which some tensors' costs are not known.
    """
    own = plan.recipe.types
    free = [t for t in tensors if len(t.ne) == 2 and not own[t.name].is_float]
    unknown = [t.name for t in tensors if len(t.ne) > 2 and not own[t.name].is_float]
    if unknown:
        raise YarnEdgeError(f"--size: {unknown[0]}: how much experts matter is not measured: choose a --quant instead")
    gradients = output_gradients(checkpoint, moments.windows)
    costs = costs_of(free, moments, gradients, _rows_of(free, gradients), plan.kernels)
    fixed = plan.layout.file_bytes - sum(tensor_bytes(cost, own[cost.name]) for cost in costs)
    chosen = choose_types(costs, wanted.file_bytes(plan) - fixed - _PADDING * len(costs))
    before, after = (sum(cost.nats.get(t[cost.name], np.nan) for cost in costs) for t in (own, chosen))
    note(
        f"types by sensitivity: {after:.3f} nats for each token are expected ({plan.quant.name}'s own types: {before:.3f})"
    )
    patterns = [(f"^{re.escape(name)}$", kind) for name, kind in chosen.items() if kind != own[name]]
    apart = {OUTPUT: "output_type", EMBEDDINGS[0]: "embedding_type"}
    others = {field: chosen[name] for name, field in apart.items() if name in chosen}
    return {"tensor_types": tuple((p, k) for p, k in patterns if not any(re.search(p, n) for n in apart)), **others}


def _rows_of(tensors: Sequence[SourceTensor], gradients: Gradients) -> dict[str, Doubles]:
    """How much the rows of each tensor of a layer, and of an output matrix of its own, matter."""
    found: dict[str, Doubles] = {}
    for tensor in tensors:
        _front, layers, rest = tensor.source.partition("layers.")
        rows = gradients.head if tensor.name == OUTPUT else gradients.rows.get(layers + rest)
        if rows is not None:
            found[tensor.name] = rows if tensor.source_rows is None else rows[tensor.source_rows]
    return found
