"""`convert --as-adapter`: LoRA adapters as one GGUF adapter, which llama.cpp adds to a running base (`--lora`).

llama.cpp computes scale * alpha / rank * B A with one alpha for the whole file. rsLoRA, patterns of ranks and alphas, weights and
several adapters have other factors, so these are multiplied into B; of a plain adapter every number stays as it is. Rows of B
have the order of the base's rows in the GGUF. Reader: llama-adapter.cpp, llama-graph.cpp (build_lora_mm, build_inp_embd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge import __version__
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import EXACT, NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.gguf.header import TensorSpec, lay_out, pack_key
from yarn_edge.gguf.read import DEFAULT_ALIGNMENT, read_gguf
from yarn_edge.llama_rules.lora_rules import ALPHA, KIND, LORA_A, LORA_B, is_norm
from yarn_edge.runtime.ggml_types import type_named

from .adapters.base import base_of
from .adapters.changes import VOCABULARY, Product, WeightChange
from .adapters.requests import AdaptedCheckpoint
from .adapters.rows import Floats, finite, view_of
from .checkpoint import Checkpoint
from .families.rows import TensorRow
from .families.sizes import ModelSizes
from .file_plan import FilePlan, Source
from .job import QuantizationJob
from .kernels.choose import Kernels
from .one_pass import SourceTensor
from .outputs import OutputOptions
from .quant_types import parse_quants
from .recipe import Recipe
from .row_reader import source_tensor
from .source_model import SourceModel, open_source_model
from .stored import RowsOf, Tensor

EMBEDDINGS = VOCABULARY[0]
_MERGE = "leave out --as-adapter to merge it"
# What a change has besides products -> why a GGUF adapter cannot hold it.
_UNFIT = {
    "magnitude": "is DoRA: a GGUF adapter has no lengths of rows",
    "whole": "is a whole tensor: a GGUF adapter has products only",
    "tokens": "are rows of tokens: a GGUF adapter has products only",
    "vectors": "is a bias: a GGUF adapter has products only",
}


def adapter_job(
    asked: AdaptedCheckpoint,
    output: OutputOptions,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
) -> QuantizationJob:
    """The adapters as one GGUF adapter, planned. Raises YarnEdgeError for what such a file cannot hold, with the reason."""
    if not asked.adapters:
        raise YarnEdgeError("--as-adapter needs --adapter DIR")
    asked = replace(asked, base=base_of(asked))
    (path,) = output.checked(asked.files)
    model = open_source_model(asked, overrides, planner)
    tensors = _tensors(model)
    f32 = type_named("F32")
    kinds = {tensor.name: f32 for tensor in tensors}
    specs = [TensorSpec(t.name, t.ne, f32.number, t.n_bytes) for t in tensors]
    entries = {key: pack_key(key, value) for key, value in _keys(model).items()}
    layout = lay_out(list(entries.values()), specs, DEFAULT_ALIGNMENT)
    source = Source(model.checkpoint.path, entries, tensors, kinds, DEFAULT_ALIGNMENT, model.checkpoint.check_unchanged)
    (quant,) = parse_quants("F32")
    plan = FilePlan(path, quant, Recipe(quant, kinds), layout, source.n_weights, Kernels(), None)
    return QuantizationJob(source, [plan], None, partial(_check, {t.name: t.ne for t in tensors}), output.force)


def _alpha(model: SourceModel) -> float:
    assert model.adapted is not None
    return float(np.float32(model.adapted.adapters[0].config.alpha))


def _keys(model: SourceModel) -> dict[str, Any]:
    assert model.adapted is not None
    config = model.adapted.adapters[0].config
    base = {"general.base_model.count": 1, "general.base_model.0.name": one_line(Path(config.base).name, 200)}
    return {
        "general.type": "adapter",
        "general.architecture": model.architecture.gguf,
        KIND: "lora",
        "general.name": one_line(model.name, 200),
        **(base if config.base else {}),
        ALPHA: _alpha(model),
        "yarn_edge.version": __version__,
    }


def _tensors(model: SourceModel) -> list[SourceTensor]:
    """A and B of every tensor that is changed, in the order of the base's."""
    assert model.adapted is not None
    changes = model.adapted.changes
    for name, change in changes.items():
        _refuse_unfit(change, name, model)
    tensors: list[SourceTensor] = []
    for row in model.rows:
        names = list(row.sources(model.sizes))
        if not changes.keys().isdisjoint(names):
            tensors += _pair(model, row, {name: changes[name].products for name in names if name in changes})
    return tensors


def _refuse_unfit(change: WeightChange, name: str, model: SourceModel) -> None:
    assert model.adapted is not None
    for what, reason in _UNFIT.items():
        if getattr(change, what):
            raise YarnEdgeError(f"{change.labels[0]} {reason}; {_MERGE}")
    if model.adapted.tied and name in VOCABULARY:
        raise YarnEdgeError(
            f"{change.labels[0]} changes embeddings or head, for which the base has one matrix: llama.cpp would add it to both, or "
            f"to neither; {_MERGE}"
        )


def _pair(model: SourceModel, row: TensorRow, products: Mapping[str, Sequence[Product]]) -> list[SourceTensor]:
    """A and B of one tensor of the GGUF. products: by source; an expert without any gets zeros."""
    if row.transposed or row.values is not None or len(row.shape) != 2 or is_norm(row.target):
        raise YarnEdgeError(
            f"{model.checkpoint.path}: tensor {row.source} is stored in a way that a GGUF adapter has not; {_MERGE}"
        )
    assert model.adapted is not None
    rank = max(sum(product.rank for product in some) for some in products.values())
    alpha = _alpha(model)
    unit = alpha / rank if alpha else 1.0  # what llama.cpp multiplies with
    height, width = row.disk_shape(model.sizes)
    lefts, rights = {}, {}
    for name in row.sources(model.sizes):
        left, right = _stacked(products.get(name, ()), rank, unit, width)
        lefts[name] = view_of(name, (height, rank), finite(left, f"{model.adapted.names}: {name}"))
        rights[name] = view_of(name, (rank, width), right)
    columns = f"{rank}*1"
    b_row = replace(row, shape=(row.shape[0], columns), columns=None)
    if row.source == EMBEDDINGS:  # looked up by row: llama.cpp wants the rows of tokens as A, and B the other way round
        flipped = {n: view_of(n, (width, rank), _transposed(t)) for n, t in rights.items()}
        pairs = (b_row, lefts), (replace(row, shape=(row.shape[1], columns), rows=None, columns=None), flipped)
    else:
        pairs = (replace(row, shape=(columns, row.shape[1]), rows=None), rights), (b_row, lefts)
    a, b = (
        _as_source(model.checkpoint, part, f"{row.target}{end}", tensors, model.sizes)
        for end, (part, tensors) in zip((LORA_A, LORA_B), pairs, strict=True)
    )
    if a.ne[2:] != b.ne[2:]:
        raise YarnEdgeError(
            f"{model.checkpoint.path}: tensor {row.source} becomes several matrices, which a GGUF adapter cannot hold; {_MERGE}"
        )
    return [a, b]


def _as_source(
    checkpoint: Checkpoint, row: TensorRow, target: str, tensors: Mapping[str, Tensor], sizes: ModelSizes
) -> SourceTensor:
    return source_tensor(replace(checkpoint, tensors=tensors), replace(row, target=target), sizes)


def _stacked(products: Sequence[Product], rank: int, unit: float, width: int) -> tuple[RowsOf, RowsOf]:
    """(rows of B, rows of A) of all products side by side, filled up with zeros to `rank`; B times scale / unit."""

    def left(start: int, stop: int) -> Floats:
        out = np.zeros((stop - start, rank), np.float32)
        at = 0
        for product in products:
            with np.errstate(over="ignore"):  # `finite` refuses the result
                out[:, at : at + product.rank] = product.factors()[0][start:stop] * np.float32(product.scale / unit)
            at += product.rank
        return out

    def right(start: int, stop: int) -> Floats:
        out = np.zeros((rank, width), np.float32)
        at = 0
        for product in products:
            out[at : at + product.rank] = product.factors()[1]
            at += product.rank
        return out[start:stop]

    return left, right


def _transposed(tensor: Tensor) -> RowsOf:
    return lambda start, stop: np.ascontiguousarray(tensor.float32().T[start:stop])


def _check(expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise YarnEdgeError unless the written file has these tensors."""
    found = {name: tensor.shape for name, tensor in read_gguf(path).tensors.items()}
    if found != dict(expected):
        raise YarnEdgeError(f"{path}: the written file has other tensors than the adapter: check the disk")
