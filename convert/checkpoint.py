"""The tensors and the config of a Hugging Face checkpoint folder, in one file or in shards. Weights are read on request.

safetensors (one file, or shards with an index) is parsed here: its header is a length and a JSON object, and bfloat16, which
NumPy lacks, stays raw until it is needed. `pytorch_model*.bin` is loaded with torch, if it is installed, and weights_only.
Format: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.adapter import refuse_unmerged
from yarn_edge.checkpoint.config_file import POINTER, ConfigFile, read_config, refuse_adapter, refuse_pointer
from yarn_edge.checkpoint.quantized import declared_method, left_over_note, refuse_quantized
from yarn_edge.checkpoint.tensor_names import canonical_names, is_computed
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.source_file import SourceFile

from .sources.mxfp4 import PACKED, packed_tensors
from .weight_files import find_weights

MAX_DIMS = 8
_COMPARED_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# safetensors dtype -> (NumPy dtype that holds its bits, is it bfloat16?)
DTYPES: dict[str, tuple[str, bool]] = {"F32": ("<f4", False), "F16": ("<f2", False), "BF16": ("<u2", True)}
# Bytes of the others, which only buffers and quantized weights have.
_OTHERS = {
    1: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    2: "I16 U16",
    4: "I32 U32",
    8: "I64 U64 F64 C64",
}
_OTHER_DTYPES = {name: size for size, names in _OTHERS.items() for name in names.split()}


@dataclass(frozen=True)
class Tensor:
    """One tensor. name: in the file. dtype: F32, F16, BF16 or MXFP4 (ggml's blocks), of others the values are not read.

    read(offset, buffer): fill a buffer from byte `offset` of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[int, Any], None]

    @property
    def row_bytes(self) -> int:
        """Size of one row of the first dimension."""
        return math.prod(self.shape[1:]) * np.dtype(DTYPES[self.dtype][0]).itemsize

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.shape[0] * self.row_bytes if self.shape else self.row_bytes

    def bits(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows [start, stop) of the first dimension, unconverted; BF16 as uint16."""
        n = len(range(*slice(start, stop).indices(self.shape[0])))
        rows = np.empty((n, *self.shape[1:]), DTYPES[self.dtype][0])
        self.read(start * self.row_bytes, rows.reshape(-1).view(np.uint8))
        return rows

    def float32(self) -> npt.NDArray[np.float32]:
        """The whole tensor as float32 (exact for every dtype)."""
        return to_float32(self.bits(), self.dtype)


def to_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Bits of dtype F32, F16 or BF16 as float32, exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights. tensors: by their names in transformers, in the order of `files`, which stay open.

    notes: decisions that users should know.
    """

    path: Path
    config: ConfigFile
    tensors: Mapping[str, Tensor]
    files: tuple[SourceFile, ...] = ()
    notes: tuple[str, ...] = ()

    def check_unchanged(self) -> None:
        """Raise YarnEdgeError if a weight file has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values (tied embeddings that were saved twice). Compares some rows at a time."""
    if a.shape != b.shape:
        return False
    step = max(1, _COMPARED_BYTES // max(1, a.row_bytes, b.row_bytes))
    parts = ((a.bits(i, i + step), b.bits(i, i + step)) for i in range(0, a.shape[0], step))
    if a.dtype == b.dtype:
        return all(x.tobytes() == y.tobytes() for x, y in parts)
    return all(np.array_equal(to_float32(x, a.dtype), to_float32(y, b.dtype)) for x, y in parts)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder and check that all of its tensors are there. No weights are read.

    Raises YarnEdgeError for what is not a model in floats: quantized weights, an adapter beside or inside them.
    """
    folder = Path(folder)
    config = read_config(folder)
    refuse_adapter(folder)
    weights = find_weights(folder, config)
    sources = tuple(SourceFile(file) for file in weights.files)
    read = read_safetensors if weights.files[0].suffix == ".safetensors" else read_torch
    tensors, notes = _usable(folder, config, _gather(sources, weights.index, read))
    notes = tuple(text for text in (weights.note, *notes) if text)
    return Checkpoint(folder, config, tensors, sources, notes)


def _usable(folder: Path, config: ConfigFile, saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the weights under their names in transformers, notes). Raises YarnEdgeError for what no model in floats has."""
    source = str(folder)
    refuse_unmerged(source, saved)
    computed = [name for name, tensor in saved.items() if is_computed(name, tensor.shape)]
    weights = {name: tensor for name, tensor in saved.items() if name not in computed}
    method = declared_method(config)
    packed = packed_tensors(source, weights) if method and method.read_as else {}
    for name, pair in packed.items():
        del weights[pair.exponents]
        weights[name] = Tensor(name, PACKED, pair.shape, pair.read)
    floats = {name: tensor.dtype for name, tensor in weights.items() if name not in packed}
    refuse_quantized(config, source, floats, DTYPES)
    for name, dtype in floats.items():
        if dtype not in DTYPES:
            raise YarnEdgeError(
                f"{source}: tensor {one_line(name, 100)} has dtype {one_line(dtype, 20)}; supported: {', '.join(DTYPES)}: "
                "save the model in one of them"
            )
    names, wrapper = canonical_names(source, weights)
    notes = (
        [f"note: {len(packed)} tensors are {PACKED}: every file has them as they are"]
        if packed
        else [left_over_note(config)]
    )
    if wrapper:
        notes.append(f"note: the names of all tensors begin with {one_line(wrapper, 60)}: read without it")
    if computed:
        notes.append(f"note: saved buffers that are not weights are left out: {one_line(', '.join(computed), 100)}")
    return {known: weights[name] for known, name in names.items()}, tuple(notes)


def _gather(
    sources: tuple[SourceFile, ...], weight_map: dict[str, str] | None, read: Callable[[SourceFile], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all files: none may appear twice, and if there is an index, each must be in the file that it names."""
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for source in sources:
        file = source.path
        for name, tensor in read(source).items():
            if name in tensors:
                raise YarnEdgeError(f"{file}: tensor {one_line(name, 100)} is also in {homes[name].name}")
            tensors[name], homes[name] = tensor, file
    if weight_map is None:
        return tensors
    by_name = {source.path.name: source.path for source in sources}
    for name, home in weight_map.items():
        if name not in homes or homes[name].name != home:
            raise YarnEdgeError(f"{by_name[home]}: tensor {one_line(name, 100)} is missing, but the index names it")
    for name, file in homes.items():
        if name not in weight_map:
            raise YarnEdgeError(f"{file}: tensor {one_line(name, 100)} is not in the index")
    return tensors


def read_safetensors(source: SourceFile) -> dict[str, Tensor]:
    """The tensors of one safetensors file, from its header. Every offset is checked against the file's size."""
    path, size = source.path, source.size

    def bad(what: str) -> YarnEdgeError:
        return YarnEdgeError(f"{path}: not a valid safetensors file: {one_line(what, 200)}")

    if size < 8:
        raise bad(f"{size} bytes")
    refuse_pointer(path, source.read(min(size, len(POINTER))))
    length = int.from_bytes(source.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise bad(f"truncated: its header claims {length} bytes, the file has {size}")
    try:
        header = json.loads(source.read(length, 8))
    except (ValueError, RecursionError) as error:
        raise bad(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise bad("its header is not an object")
    header.pop("__metadata__", None)
    tensors: dict[str, Tensor] = {}
    base, covered = 8 + length, 0
    entries = sorted(header.items(), key=lambda item: _offsets(item[1]) or (-1, -1))
    for name, entry in entries:
        span = _offsets(entry)
        shape, dtype = (entry.get("shape"), entry.get("dtype")) if isinstance(entry, dict) else (None, None)
        if span is None or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise bad(f"tensor {name} has no valid dtype, shape and data_offsets")
        if len(shape) > MAX_DIMS or any(n > size for n in shape):
            raise bad(f"tensor {name} has the shape {shape[:8]}")
        item = _item_bytes(dtype) if isinstance(dtype, str) else None
        if not isinstance(dtype, str) or item is None:
            raise YarnEdgeError(
                f"{path}: tensor {one_line(name, 100)} has dtype {one_line(str(dtype), 20)}; supported: {', '.join(DTYPES)}"
            )
        begin, end = span
        if base + end > size:
            raise YarnEdgeError(
                f"{path}: truncated: tensor {one_line(name, 100)} ends at byte {base + end}, the file at {size}"
            )
        if begin != covered or end - begin != math.prod(shape) * item:
            raise bad(f"tensor {name} of shape {shape} and dtype {dtype} does not fill bytes {begin} to {end}")
        covered = end
        tensors[name] = Tensor(name, dtype, tuple(shape), _reader(source, base + begin))
    if base + covered != size:
        raise bad(f"{size - base - covered} bytes after the last tensor")
    return tensors


def _item_bytes(dtype: str) -> int | None:
    """Bytes of one value; None for a dtype that is not known."""
    return np.dtype(DTYPES[dtype][0]).itemsize if dtype in DTYPES else _OTHER_DTYPES.get(dtype)


def _reader(source: SourceFile, start: int) -> Callable[[int, Any], None]:
    return lambda offset, buffer: source.read_into(buffer, start + offset)


def _offsets(entry: Any) -> tuple[int, int] | None:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1]:
        return span[0], span[1]
    return None


def read_torch(source: SourceFile) -> dict[str, Tensor]:
    """The tensors of one pytorch_model*.bin, loaded by torch with weights_only and mapped if the format allows."""
    path = source.path
    try:
        import torch
    except ImportError as error:
        raise YarnEdgeError(
            f"{path}: pytorch_model.bin needs torch: pip install 'yarn-edge[hf]', or save the model as safetensors"
        ) from error
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote a format that cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        raise YarnEdgeError(
            f"{path}: torch cannot load it safely: {one_line(str(error) or type(error).__name__, 200)}"
        ) from error
    if not isinstance(state, dict):
        raise YarnEdgeError(f"{path}: holds a {type(state).__name__}, not a state dict")
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key)
        if not isinstance(value, torch.Tensor):
            raise YarnEdgeError(
                f"{path}: {one_line(name, 100)} is a {type(value).__name__}, not a tensor; supported: {', '.join(DTYPES)}"
            )
        dtype = names.get(value.dtype, str(value.dtype).removeprefix("torch."))
        bits = value.detach().contiguous() if dtype in DTYPES else torch.empty(0)
        held = bits.view(torch.uint16).numpy() if dtype == "BF16" else bits.numpy()
        tensors[name] = Tensor(name, dtype, tuple(value.shape), _copier(source, held))
    return tensors


def _copier(source: SourceFile, held: npt.NDArray[Any]) -> Callable[[int, Any], None]:
    """A reader of a mapped tensor. It checks the file first, so that a file shrinking is a danger only for a moment."""
    data = held.reshape(-1).view(np.uint8)

    def read(offset: int, buffer: Any) -> None:
        source.check_unchanged()
        buffer[:] = data[offset : offset + len(buffer)]

    return read
