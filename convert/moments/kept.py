"""Moments in a file, to be used again: an importance matrix as llama.cpp's programs read it, with the second moments beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.header import F32_TENSOR, TensorSpec, lay_out, pack_key, pack_strings
from yarn_edge.gguf.read import read_gguf
from yarn_edge.regular_file import open_regular
from yarn_edge.writer import check_space, flush_file, open_output, partial_file, publish

from ..imatrix.matrix import CHUNK_COUNT, CHUNK_SIZE, COUNTS_SUFFIX, DATASETS, SUMS_SUFFIX, read_imatrix
from .gradients import Gradients
from .moments import Moments
from .sums import StoredSums, SumsPlace, sums_floats

_KEYS = "yarn_edge.moments."
_FORM = 2
_SUMS, _WINDOWS, _GRADIENT = "moments.", "windows", "gradient."
_STEP = 1 << 22  # numbers that are copied at a time
_PARTS = ("head", "head_moments", "embedding")
_Numbers = Callable[[int, int], npt.NDArray[np.float32]]


def write_moments(moments: Moments, path: Path, force: bool) -> None:
    """Write the file whole or not at all. Raises YarnEdgeError if the disk has no room, or if the file exists and `force` is not set."""
    parts, names = _tensors(moments)
    told = {"rows": moments.rows, "input_of": moments.input_of, "places": names["places"], "gradients": names["rows"]}
    told["gradient_tokens"] = 0 if moments.gradients is None else moments.gradients.tokens
    entries = [
        pack_key("general.type", "imatrix"),
        pack_strings(DATASETS, moments.texts),
        pack_key(CHUNK_COUNT, len(moments.windows)),
        pack_key(CHUNK_SIZE, len(moments.windows[0])),
        pack_key(_KEYS + "form", _FORM),
        pack_key(_KEYS + "model", moments.model),
        pack_key(_KEYS + "read", moments.read),
        pack_key(_KEYS + "inputs", json.dumps(told)),
    ]
    specs = [TensorSpec(name, ne, F32_TENSOR, 4 * count) for name, ne, count, _numbers in parts]
    layout = lay_out(entries, specs)
    check_space(path.parent, layout.file_bytes, "the moments")
    with partial_file(path) as partial:
        with io.BufferedWriter(open_output(partial)) as file:
            file.write(layout.header)
            for name, _ne, count, numbers in parts:
                file.seek(layout.offsets[name])
                for first in range(0, count, _STEP):
                    file.write(np.ascontiguousarray(numbers(first, min(_STEP, count - first)), "<f4").tobytes())
            file.truncate(layout.file_bytes)
        flush_file(partial)
        publish(partial, path, force)


def _tensors(moments: Moments) -> tuple[list[tuple[str, tuple[int, ...], int, _Numbers]], dict[str, Any]]:
    """(name, ggml's shape, count, numbers) of each tensor of the file; and what their numbered names stand for."""
    parts: list[tuple[str, tuple[int, ...], int, _Numbers]] = []

    def put(name: str, values: npt.NDArray[Any]) -> None:
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        shape = tuple(reversed(values.shape))
        parts.append((name, shape, flat.size, lambda first, count: flat[first : first + count]))

    for name, importance in sorted(moments.squares.items()):
        dense = len(importance.counts) == 1  # ggml omits trailing dimensions of 1
        put(name + SUMS_SUFFIX, importance.sums[0] if dense else importance.sums)
        put(name + COUNTS_SUFFIX, importance.counts if dense else importance.counts[:, None])
    put(_WINDOWS, np.array(moments.windows, np.float32))  # exact: no vocabulary has 2^24 tokens
    rows: list[str] = []
    if moments.gradients is not None:
        for part in _PARTS:
            put(_GRADIENT + part, getattr(moments.gradients, part))
        rows = list(moments.gradients.rows)
        for i, name in enumerate(rows):
            put(f"{_GRADIENT}{i}", moments.gradients.rows[name])
    places = []
    for i, (name, place) in enumerate(moments.sums.places.items()):
        count = sums_floats(place.width)
        parts.append((f"{_SUMS}{i}", (count,), count, place.numbers))
        places.append([name, place.width])
    return parts, {"places": places, "rows": rows}


def read_moments(path: Path, model: str, read: str | None) -> Moments:
    """The moments of a file; their sums stay in it.

    model: identity of the model that they are to be of; read: of the texts, if these are given. Raises YarnEdgeError for other
    moments, and for a file that is damaged.
    """
    file = read_gguf(path)
    if file.metadata.get(_KEYS + "form") != _FORM:
        raise YarnEdgeError(f"{path}: has no moments: make the file with --calibrate TEXT,TEXT --moments {path}")
    if file.metadata.get(_KEYS + "model") != model:
        raise YarnEdgeError(f"{path}: its moments are those of another model")
    if read is not None and file.metadata.get(_KEYS + "read") != read:
        raise YarnEdgeError(
            f"{path}: was made from other texts, or another --calibrate-tokens: leave out --calibrate to use it as it is, "
            "or name another file"
        )
    matrix = read_imatrix(path)
    try:
        told = json.loads(str(file.metadata[_KEYS + "inputs"]))
        windows = [[int(token) for token in row] for row in _values(file, _WINDOWS)]
        places = {str(name): _place(file, i, int(width)) for i, (name, width) in enumerate(told["places"])}
        rows = {str(name): int(n) for name, n in told["rows"].items()}
        input_of = {str(weight): str(name) for weight, name in told["input_of"].items()}
        gradients = _gradients(file, told["gradients"], int(told["gradient_tokens"])) if told["gradients"] else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise YarnEdgeError(f"{path}: its moments are damaged: {one_line(repr(error), 200)}") from error
    if not windows or min(rows.values(), default=1) < 1 or places.keys() != rows.keys():
        raise YarnEdgeError(f"{path}: its moments are damaged: there are no tokens for some")
    n_tokens = sum(map(len, windows))
    found = Moments(StoredSums(places), rows, input_of, matrix.entries, matrix.datasets, n_tokens, windows)
    return replace(found, gradients=gradients, model=model, read=str(file.metadata.get(_KEYS + "read")))


def _tensor(file: GGUFFile, name: str) -> TensorInfo:
    tensor = file.tensors[name]
    if tensor.type_name != "F32":
        raise ValueError(f"{name} is {tensor.type_name}")
    return tensor


def _place(file: GGUFFile, number: int, width: int) -> SumsPlace:
    tensor = _tensor(file, f"{_SUMS}{number}")
    if width < 1 or tensor.n_elements != sums_floats(width):
        raise ValueError(f"{tensor.name} has {tensor.n_elements} numbers for a width of {width}")
    return SumsPlace(tensor.path, tensor.offset, width)


def _values(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    tensor = _tensor(file, name)
    with open_regular(tensor.path) as opened:
        opened.seek(tensor.offset)
        values = np.fromfile(opened, "<f4", tensor.n_elements)
    if len(values) != tensor.n_elements or not np.isfinite(values).all() or values.size == 0:
        raise ValueError(f"{name} is cut off, or not finite")
    return values.reshape(tuple(reversed(tensor.shape)))


def _gradients(file: GGUFFile, rows: list[str], tokens: int) -> Gradients:
    parts: Mapping[str, Any] = {part: _values(file, _GRADIENT + part) for part in _PARTS}
    by_name = {str(name): _values(file, f"{_GRADIENT}{i}").astype(np.float64) for i, name in enumerate(rows)}
    head, embedding = parts["head"].astype(np.float64), parts["embedding"]
    if any((values < 0).any() for values in (*by_name.values(), head, np.diagonal(embedding))):
        raise ValueError("a mean square is negative")
    return Gradients(by_name, head, parts["head_moments"], embedding, tokens)
