"""A checkpoint's tensors as the rows of its family want them: every one is used, of the right shape, and read slice by slice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.ggml_types import type_named

from .checkpoint import DTYPES, Checkpoint, Tensor, same_values, to_float32
from .families.architectures import tensor_rows, unknown_tensor
from .families.rows import Architecture, ModelSizes, TensorRow, Wrapper, interleave
from .one_pass import SourceTensor

_BAND_BYTES = 1 << 16  # transposed from the cache: at 4.2 GB/s, with a whole expert at 1.2 (2048 x 1536 in BF16)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def language_model(checkpoint: Checkpoint, wrapper: Wrapper | None) -> Checkpoint:
    """The checkpoint without what is around its language model, with a note about it."""
    if wrapper is None:
        return checkpoint
    tensors: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        outside = next((start for start in wrapper.left_out if name.startswith(start)), None)
        if outside is not None:
            left_out[outside.removeprefix("model.").removesuffix(".")] += 1
            continue
        inside = next(((old, new) for old, new in wrapper.names if name.startswith(old)), ("", ""))
        known = inside[1] + name.removeprefix(inside[0])
        if known in tensors:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensors {one_line(tensors[known].name, 100)} and {one_line(tensor.name, 100)} are both "
                f"{one_line(known, 100)} of the language model: remove one of them"
            )
        tensors[known] = tensor
    parts = ", ".join(f"{name} ({n} tensors)" for name, n in left_out.items())
    notes = [f"note: only the language model is converted; left out: {parts}"] if parts else []
    notes += [f"note: the file is for text alone: {wrapper.text_alone}"] if wrapper.text_alone else []
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, *notes))


def check_counts(checkpoint: Checkpoint, row: Architecture, config: ConfigFile) -> None:
    """Raise YarnEdgeError for more layers or experts than the tensors can be for, before a name is made for each.

    A layer has tensors of its own, and the router a row for each expert.
    """
    tensors = checkpoint.tensors
    longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
    limits = {"num_hidden_layers": (len(tensors), f"it has {len(tensors)} tensors")}
    limits |= dict.fromkeys(row.sizes.get("experts", ()), (longest, f"no dimension of a tensor is above {longest}"))
    for key, (limit, why) in limits.items():
        count = config.integer(key)
        if count is not None and count > limit:
            raise config.error(key, f"is {count}, more than {checkpoint.path} can hold ({why}): correct it")


def match_tensors(
    checkpoint: Checkpoint, row: Architecture, sizes: ModelSizes, scaling: RopeScaling
) -> list[TensorRow]:
    """The rows to write. Every tensor of the checkpoint must be used and have the shape that the config implies."""
    rows = tensor_rows(row, checkpoint.config, sizes)
    tensors = checkpoint.tensors
    if _EMBEDDINGS not in tensors and _HEAD in tensors and _HEAD not in {r.source for r in rows}:
        # Of tied weights one name is saved, whichever; transformers takes it for both.
        rows = [replace(r, source=_HEAD) if r.source == _EMBEDDINGS else r for r in rows]
    rows = [_as_saved(r, sizes, checkpoint) for r in rows]
    for r in rows:
        _check_sources(checkpoint, r, sizes)
    used = {source for r in rows for source in r.sources(sizes)}
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name.endswith("rotary_emb.inv_freq"):
            _check_inv_freq(checkpoint, tensor, scaling)
        elif name == _HEAD:
            if not same_values(tensor, tensors[_EMBEDDINGS]):
                raise YarnEdgeError(
                    f"{checkpoint.path}: lm_head.weight differs from the embeddings, but config.json ties them "
                    "(tie_word_embeddings): correct one of them"
                )
        else:
            raise unknown_tensor(str(checkpoint.path), tensor.name)
    return rows


def _as_saved(row: TensorRow, sizes: ModelSizes, checkpoint: Checkpoint) -> TensorRow:
    """The row in the layout that the checkpoint has. Raises YarnEdgeError if two layouts have one name and one shape."""
    other, tensors = row.other, checkpoint.tensors
    if other is None or next(other.sources(sizes)) not in tensors:
        return row
    saved = tensors.get(next(row.sources(sizes)))
    if saved is None:
        return other
    if other.source != row.source:
        return row
    if row.disk_shape(sizes) == other.disk_shape(sizes):
        raise YarnEdgeError(
            f"{checkpoint.path}: tensor {row.source} has the shape {list(saved.shape)}, which does not tell whether its matrices are "
            "transposed: published checkpoints have them so, those of transformers 5 do not. It cannot be converted"
        )
    return other if saved.shape == other.disk_shape(sizes) else row


def _check_sources(checkpoint: Checkpoint, row: TensorRow, sizes: ModelSizes) -> None:
    """Raise YarnEdgeError unless all tensors of a row are there, with one shape and one type."""
    tensors, expected = checkpoint.tensors, row.disk_shape(sizes)
    first = next(row.sources(sizes))
    for source in row.sources(sizes):
        if source not in tensors:
            raise YarnEdgeError(f"{checkpoint.path}: tensor {source} is missing{_similar(source, tensors)}")
        if tensors[source].shape != expected:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {source} has the shape {list(tensors[source].shape)}, but config.json implies "
                f"{list(expected)}"
            )
        if tensors[source].dtype != tensors[first].dtype:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {source} is {tensors[source].dtype}, but {first} is "
                f"{tensors[first].dtype}: save all experts of a layer in one type"
            )


def _similar(missing: str, tensors: Mapping[str, Tensor]) -> str:
    """Why a tensor is missing, as far as the names of the others show it."""
    tail = "." + missing.removeprefix("model.")
    for tensor in tensors.values():
        if tensor.name.endswith(tail):
            return f", but {one_line(tensor.name, 100)} is there: rename the tensors as transformers does"
    if missing == _HEAD:
        return (
            ": save the model with its head, or set tie_word_embeddings in config.json if the embeddings are the head"
        )
    return ""


def _check_inv_freq(checkpoint: Checkpoint, tensor: Tensor, scaling: RopeScaling) -> None:
    """A saved frequency buffer is not needed, but if it disagrees with the config, one of the two is wrong."""
    saved = tensor.float32().astype(np.float64)
    rounding = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}[tensor.dtype]
    floor = 1e-7 if tensor.dtype == "F16" else 0.0  # half precision has no smaller numbers
    plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
    for expected in (rope.inv_freq(scaling), plain):
        if saved.shape == expected.shape and bool(np.all(np.abs(saved - expected) <= rounding * expected + floor)):
            return
    raise YarnEdgeError(
        f"{checkpoint.path}: {tensor.name} holds other frequencies than config.json describes (rope_theta, RoPE scaling)"
    )


def source_tensor(checkpoint: Checkpoint, row: TensorRow, sizes: ModelSizes) -> SourceTensor:
    """The tensor of a row, as the pipeline reads it: its sources one after another, of each the row's part."""
    sources = [checkpoint.tensors[name] for name in row.sources(sizes)]
    on_disk = row.disk_shape(sizes)
    index, parts = row.part
    *stack, height, width = on_disk if len(on_disk) > 1 else [1, *on_disk]
    if row.transposed:
        height, width = width, height
    rows, matrices = height // parts, math.prod(stack)
    shape = [*([len(sources)] if "{e}" in row.source else []), *stack, rows, width]
    while len(shape) > 1 and shape[0] == 1:  # llama.cpp's quantizer drops such dimensions too
        del shape[0]
    dtype = sources[0].dtype
    kind, item = type_named(dtype), DTYPES[dtype][0]
    row_bytes = kind.row_bytes(width)

    def read(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        matrix, inside = divmod(first_row, rows)
        source, matrix = divmod(matrix, matrices)
        at = index * rows + inside
        if row.transposed:
            _read_columns(sources[source], matrix * width, at, height, out.view(item))
        else:
            sources[source].read((matrix * height + at) * row_bytes, out.reshape(-1))
        if row.interleaved:
            bits = out.view(item).reshape(-1) if len(shape) == 1 else out
            bits[:] = interleave(sizes, bits)

    def read_plus_one(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        saved = np.empty((len(out), row_bytes), np.uint8)
        read(first_row, saved)
        out.view(np.float32)[:] = to_float32(saved.view(item), dtype) + np.float32(1)

    label = f"{checkpoint.path}: tensor {row.source.replace('{e}', '*')}"
    grain = sizes.head_dim if row.interleaved and len(shape) > 1 else 1
    grain = rows if row.transposed else grain  # a matrix is read once
    reader = read_plus_one if row.plus_one else read
    return SourceTensor(
        row.target, tuple(reversed(shape)), type_named("F32") if row.plus_one else kind, reader, label, grain
    )


def _read_columns(tensor: Tensor, first_row: int, first_column: int, n_columns: int, out: npt.NDArray[Any]) -> None:
    """Fill `out`, (n, rows of a matrix), with n columns of the matrix that begins at `first_row`; its rows have n_columns values.

    A band of rows is in memory at a time.
    """
    n, n_rows = out.shape
    row_bytes = n_columns * out.itemsize
    step = max(1, _BAND_BYTES // row_bytes)
    for row in range(0, n_rows, step):
        band = np.empty((min(step, n_rows - row), n_columns), out.dtype)
        tensor.read((first_row + row) * row_bytes, band.reshape(-1).view(np.uint8))
        out[:, row : row + len(band)] = band[:, first_column : first_column + n].T
