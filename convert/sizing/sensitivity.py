"""What each tensor costs in each type, before a file is made: half of G_r · e_r H e_rᵀ, added up over its rows, in nats for each token.

e_r is the error that the type makes in row r, of which some rows are tried; H the second moments of the inputs, G_r how much the row's
result matters (`gradients`). Of embeddings, whose rows are the tokens, the columns matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, type_named

from ..kernels.choose import Kernels
from ..kernels.feedback import quantize_with_feedback
from ..kernels.layout import LAYOUTS
from ..moments.gradients import Gradients
from ..moments.moments import FactorsOf, Moments
from ..one_pass import SourceTensor

CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NARROW = ("Q4_0", "Q5_0", "Q8_0")  # for rows that hold no K-quants
TRIED = 128  # rows of a tensor: evenly over those in the order of how much they matter
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TensorCost:
    """What one tensor may become: type -> nats of KL for each token. n_weights: of the tensor."""

    name: str
    n_weights: int
    nats: Mapping[GGMLType, float]


def kinds_for(width: int) -> list[GGMLType]:
    """The types that rows of this width may become."""
    return [type_named(name) for name in (CANDIDATES if type_named("Q2_K").holds(width) else NARROW)]


@dataclass(frozen=True)
class Mattering:
    """How much the rows of a tensor's target matter, and what its inputs are: rows (n,), moments (width, width) or its diagonal."""

    rows: Doubles
    moments: Floats


def tensor_cost(
    tensor: SourceTensor, matters: Mattering, kernels: Kernels, factors: FactorsOf, kinds: Sequence[GGMLType]
) -> TensorCost:
    """Try the types on some rows of a tensor."""
    order = np.argsort(matters.rows, kind="stable")
    picked = np.sort(order[np.linspace(0, len(order) - 1, min(TRIED, len(order))).astype(int)])
    rows = _rows_of(tensor, picked)
    share = len(order) / len(picked)
    found = factors(tensor.name, tensor.width)
    nats = {}
    for kind in kinds:
        made = np.empty((len(rows), kind.row_bytes(tensor.width)), np.uint8)
        if found is not None and kind.name in LAYOUTS:
            quantize_with_feedback(kernels, kind, rows, found, made)
        else:
            kernels.quantize_into(kind, rows, made)
        read = np.empty_like(rows)
        dequantize_into(kind, made.reshape(-1), read.reshape(-1))
        errors = (read - rows).astype(np.float64)
        if matters.moments.ndim == 1:
            powers = np.square(errors) @ matters.moments
        else:
            powers = np.einsum("ij,ij->i", (read - rows) @ matters.moments, errors)
        nats[kind] = float(0.5 * share * (matters.rows[picked] * powers).sum())
    return TensorCost(tensor.name, tensor.n_rows * tensor.width, nats)


def _rows_of(tensor: SourceTensor, picked: npt.NDArray[np.intp]) -> Floats:
    """These rows in float32; with each, its head is read."""
    grain, out = tensor.grain, np.empty((len(picked), tensor.width), np.float32)
    raw = np.empty((grain, tensor.kind.row_bytes(tensor.width)), np.uint8)
    whole, held = np.empty((grain, tensor.width), np.float32), -1
    for i, row in enumerate(picked):
        if row // grain != held:
            held = int(row) // grain
            tensor.read(held * grain, raw)
            dequantize_into(tensor.kind, raw.reshape(-1), whole.reshape(-1))
        out[i] = whole[row % grain]
    return out


def costs_of(
    tensors: Sequence[SourceTensor],
    moments: Moments,
    gradients: Gradients,
    rows_of: Mapping[str, Doubles],
    kernels: Kernels,
) -> list[TensorCost]:
    """For each of `tensors`. rows_of: by name, how much the rows matter, in the order of the GGUF; the head and the embeddings
    apart. Raises YarnEdgeError for a tensor of which it is not known.
    """
    factors, costs = FactorsOf(moments), []
    with bar("Types", len(tensors)) as advance:
        for tensor in tensors:
            matters = _matters(tensor, moments, gradients, rows_of)
            costs.append(tensor_cost(tensor, matters, kernels, factors, kinds_for(tensor.width)))
            advance(1)
    return costs


def _matters(tensor: SourceTensor, moments: Moments, gradients: Gradients, rows_of: Mapping[str, Doubles]) -> Mattering:
    if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and "output.weight" not in rows_of):
        return Mattering(gradients.head, gradients.head_moments)
    if tensor.name == "token_embd.weight":
        return Mattering(np.full(tensor.n_rows, 1 / tensor.n_rows), gradients.embedding.astype(np.float32))
    name = moments.input_of.get(tensor.name)
    if name is None or tensor.name not in rows_of:
        raise YarnEdgeError(f"{tensor.name}: it is not known how much its errors matter (experts are not measured yet)")
    return Mattering(rows_of[tensor.name], moments.sums[name] / np.float32(moments.rows[name]))
