"""Which weights of an importance matrix belong to which tensor, and whether every tensor that needs some has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import requires_weights

from .imatrix.matrix import ImportanceMatrix
from .one_pass import SourceTensor
from .recipe import EMBEDDINGS, Recipe

_LARGEST = 1e15  # ggml's kernels sum importance times squares in float32


def importance_weights(
    tensors: Sequence[SourceTensor], matrix: ImportanceMatrix | None
) -> dict[str, npt.NDArray[np.float32]]:
    """Importance weights, (matrices * width,), by tensor name, of the tensors that have an entry.

    Raises YarnEdgeError for a damaged matrix, or one of another model.
    """
    if matrix is None:
        return {}
    by_name: dict[str, npt.NDArray[np.float32]] = {}
    for tensor in tensors:
        entry = matrix.entries.get(tensor.name)
        if entry is None:
            continue
        weights, name = entry.weights(), one_line(tensor.name, 100)
        if weights.max(initial=0) > _LARGEST:
            raise YarnEdgeError(f"{matrix.path}: {name} has an importance of {weights.max():g}: the file is damaged")
        if weights.size == tensor.n_rows // tensor.rows_per_matrix * tensor.width:
            by_name[tensor.name] = weights
        elif tensor.name not in EMBEDDINGS:  # the only ones that llama.cpp skips
            raise YarnEdgeError(
                f"{matrix.path}: has {weights.size} values for {name}, whose shape is {list(tensor.ne)}: it was made for "
                "another model"
            )
    return by_name


def check_importance(
    source: Path, tensors: Sequence[SourceTensor], recipe: Recipe, matrix: ImportanceMatrix | None
) -> None:
    """Raise YarnEdgeError if `recipe` needs importance weights that `matrix` does not have. source: what is quantized."""
    weights = importance_weights(tensors, matrix)
    kinds = {t.name: t.kind for t in tensors}
    unmakeable = [n for n, kind in recipe.types.items() if kind != kinds[n] and requires_weights(kind)]
    lacking = [name for name in dict.fromkeys((*recipe.requires_importance, *unmakeable)) if name not in weights]
    quantized = [
        n for n, kind in recipe.types.items() if not kind.is_float and kind != kinds[n] and n not in EMBEDDINGS
    ]
    if matrix is not None and quantized and not weights:
        raise YarnEdgeError(f"{matrix.path}: has no entry for any tensor of {source}: it was made for another model")
    if matrix is not None and (without := [n for n in quantized if n not in weights]) and not lacking:
        note(f"{recipe.quant.name}: the importance matrix has no entry for {name_list(without)}: quantized without it")
    if lacking:
        needs = f"{recipe.quant.name} needs an importance matrix for {name_list(lacking)}"
        if matrix is None:
            raise YarnEdgeError(f"{needs}: make one with `yarn-edge imatrix` and pass it with --imatrix FILE")
        raise YarnEdgeError(f"{matrix.path}: {needs}, and has none for them")


def name_list(names: Sequence[str]) -> str:
    """Names for a message: one or two in full, more as a number and the first two."""
    shown = one_line(", ".join(names[:2]), 120)
    return f"{len(names)} tensors ({shown}, …)" if len(names) > 2 else shown
