"""What each tensor costs in each type, before a file is made: half of G_r · e_r H e_rᵀ, added up over its rows, in nats for each token.

e_r is the error that the type makes in row r, of which some rows are tried; H the second moments of the inputs, G_r how much the row's
result matters (`gradients`). Of embeddings, whose rows are the tokens, H is of the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.memory.weights import OUTPUT, TOKEN_EMBEDDINGS
from yarn_edge.progress import bar
from yarn_edge.regular_file import read_regular
from yarn_edge.runtime.ggml_types import GGMLType, dequantize_into, type_named
from yarn_edge.writer import write_file

from ..kernels.choose import Kernels
from ..kernels.feedback import Factors, quantize_with_feedback
from ..kernels.layout import LAYOUTS
from ..moments.gradients import Gradients
from ..moments.moments import FactorsOf, Moments
from ..one_pass import SourceTensor

CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
NARROW = ("Q4_0", "Q5_0", "Q8_0")  # for rows that hold no K-quants
TRIED = 128  # rows of a tensor, each for an equal share of what all matter
_TRIED_EXPERTS = 4  # likewise, with a part of these rows each
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TensorCost:
    """What one tensor may become: type -> nats of KL for each token. n_weights: of the tensor; n_used: those that a token is multiplied
    with, on average.
    """

    name: str
    n_weights: int
    n_used: float
    nats: Mapping[GGMLType, float]


def kinds_for(width: int) -> list[GGMLType]:
    """The types that rows of this width may become."""
    return [type_named(name) for name in (CANDIDATES if type_named("Q2_K").holds(width) else NARROW)]


@dataclass(frozen=True)
class Mattering:
    """How much the rows of a tensor's target matter, and what its inputs are. rows: (matrices, n). moments: by the number of a matrix,
    (width, width) or its diagonal, (width,).
    """

    rows: Doubles
    moments: Callable[[int], Floats]


def nats_of(
    tensor: SourceTensor, matters: Mattering, kernels: Kernels, factors: FactorsOf, kinds: Sequence[GGMLType]
) -> dict[GGMLType, float]:
    """The nats of each type. Try the types on some rows of a tensor, of experts on some rows of some of them."""
    nats = dict.fromkeys(kinds, 0.0)
    by_matrix = matters.rows.sum(1)
    tried, matrix_shares = _spread(by_matrix, _TRIED_EXPERTS)
    for matrix, matrix_share in zip(tried, matrix_shares, strict=True):
        picked, shares = _spread(matters.rows[matrix], TRIED // len(tried))
        rows = _rows_of(tensor, picked + matrix * tensor.rows_per_matrix)
        moments, found = matters.moments(int(matrix)), factors(tensor.name, tensor.width, int(matrix))
        for kind in kinds:
            errors = _errors(kernels, kind, rows, found)
            if moments.ndim == 1:
                powers = np.square(errors, dtype=np.float64) @ moments
            else:
                powers = np.einsum("ij,ij->i", errors @ moments, errors, dtype=np.float64)
            nats[kind] += float(0.5 * by_matrix.sum() * matrix_share * (shares * powers).sum())
    return nats


def _spread(values: Doubles, wanted: int) -> tuple[npt.NDArray[np.intp], Doubles]:
    """Up to `wanted` indices, and the share of the sum of all values that each stands for.

    All, if they are no more; else evenly along the sum, in the order of the values: of an output matrix a few rows are most of it.
    """
    weights = values if values.sum() > 0 else np.ones(len(values))
    if len(weights) <= wanted:
        return np.arange(len(weights)), weights / weights.sum()
    order = np.argsort(weights, kind="stable")
    ends = np.cumsum(weights[order])
    at = np.searchsorted(ends, (np.arange(wanted) + 0.5) / wanted * ends[-1])
    picked, counts = np.unique(order[at], return_counts=True)
    return picked, counts / wanted


def _errors(kernels: Kernels, kind: GGMLType, rows: Floats, factors: Factors | None) -> Floats:
    made = np.empty((len(rows), kind.row_bytes(rows.shape[1])), np.uint8)
    if factors is not None and kind.name in LAYOUTS:
        quantize_with_feedback(kernels, kind, rows, factors, made)
    else:
        kernels.quantize_into(kind, rows, made)
    read = np.empty_like(rows)
    dequantize_into(kind, made.reshape(-1), read.reshape(-1))
    read -= rows
    return read


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
    kept: Path | None = None,
) -> list[TensorCost]:
    """For each of `tensors`. rows_of: by name, how much the rows matter, in the order of the GGUF, (n,) or of experts (experts, n); the
    head and the embeddings apart. kept: a file for what a run that is ended has so far, from which the next goes on. Raises
    YarnEdgeError for a tensor of which it is not known.
    """
    factors, costs = FactorsOf(moments), list[TensorCost]()
    known = _known(kept)
    with bar("Types", len(tensors)) as advance:
        for tensor in tensors:
            if tensor.name not in known:
                matters = _matters(tensor, moments, gradients, rows_of)
                measured = nats_of(tensor, matters, kernels, factors, kinds_for(tensor.width))
                known[tensor.name] = {kind.name: value for kind, value in measured.items()}
                if kept is not None:
                    write_file(kept, json.dumps(known), force=True)
            nats = {type_named(name): value for name, value in known[tensor.name].items()}
            n_weights, tied = tensor.n_rows * tensor.width, OUTPUT not in rows_of
            costs.append(TensorCost(tensor.name, n_weights, n_weights * _share_used(tensor.name, moments, tied), nats))
            advance(1)
    return costs


def _share_used(name: str, moments: Moments, tied: bool) -> float:
    """The part of a tensor's weights that a token is multiplied with. tied: the embeddings are the output matrix too."""
    if name == TOKEN_EMBEDDINGS:
        return float(tied)
    squares = moments.squares.get(name)
    return 1.0 if squares is None else float(squares.counts.sum() / len(squares.counts) / moments.tokens)


def _known(kept: Path | None) -> dict[str, dict[str, float]]:
    if kept is None or not kept.is_file():
        return {}
    found: dict[str, dict[str, float]] = json.loads(read_regular(kept, 1 << 28))
    return found


def _matters(tensor: SourceTensor, moments: Moments, gradients: Gradients, rows_of: Mapping[str, Doubles]) -> Mattering:
    if tensor.name == OUTPUT or (tensor.name == TOKEN_EMBEDDINGS and OUTPUT not in rows_of):
        rows, same = gradients.head[None], gradients.head_moments
        fits = same.shape == (tensor.width, tensor.width)
    elif tensor.name == TOKEN_EMBEDDINGS:
        rows, same = np.full((1, tensor.n_rows), 1 / tensor.n_rows), gradients.embedding
        fits = same.shape == (tensor.width, tensor.width)
    elif tensor.name in rows_of and tensor.name in moments.squares:
        rows, same = np.atleast_2d(rows_of[tensor.name]), moments.squares[tensor.name].weights()
        fits = same.size == len(rows) * tensor.width
    else:
        raise YarnEdgeError(f"{tensor.name}: it is not known how much its errors matter: choose a --quant instead")
    if not fits or rows.size != tensor.n_rows:
        raise YarnEdgeError(f"{tensor.name}: what is known of it does not fit its shape {list(tensor.ne)}")

    def of_matrix(matrix: int) -> Floats:
        name = moments.input_name(tensor.name, tensor.width, matrix)
        if name is not None:
            return moments.mean(name)
        return same if len(rows) == 1 else same.reshape(-1, tensor.width)[matrix]

    return Mattering(rows, of_matrix)
