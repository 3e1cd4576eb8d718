"""The tensors and the config of a Hugging Face checkpoint folder, in one file or in shards. Weights are read on request.

safetensors (one file, or shards with an index) is parsed here: its header is a length and a JSON object, and bfloat16, which
NumPy lacks, stays raw until it is needed. `pytorch_model*.bin` is loaded with torch, if it is installed, and weights_only.
Format: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.adapter import refuse_unmerged
from yarn_edge.checkpoint.config_file import POINTER, ConfigFile, read_config, refuse_adapter, refuse_pointer
from yarn_edge.checkpoint.quantized import declared_method, left_over_note, refuse_quantized
from yarn_edge.checkpoint.tensor_names import canonical_names, is_computed
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.source_file import ByteSource, SourceFile

from .sources.methods import dequantized
from .sources.mxfp4 import PACKED, packed_tensors
from .stored import DTYPES, Tensor, item_bytes, to_float32
from .weight_files import find_weights

MAX_DIMS = 8
# torch's name -> safetensors'. Of others nothing is read.
_TORCH = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}
_COMPARED_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights. tensors: by their names in transformers, in the order of `files`, which stay open.

    notes: decisions that users should know. quantization: how the files hold the weights, "" if as floats. remote: what comes from the Hub.
    """

    path: Path
    config: ConfigFile
    tensors: Mapping[str, Tensor]
    files: tuple[ByteSource, ...] = ()
    notes: tuple[str, ...] = ()
    quantization: str = ""
    remote: RemoteWeights | None = None

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


def open_checkpoint(
    folder: str | Path, adapters: Collection[Path] = (), remote: RemoteWeights | None = None
) -> Checkpoint:
    """Open a checkpoint folder and check that all of its tensors are there. No weights are read. remote: files of it on the Hub.

    adapters: folders of adapters that will be merged; one of them may be this folder. Quantized weights are dequantized when they are
    read. Raises YarnEdgeError for those that nobody here can read, and for another adapter beside or inside the weights.
    """
    folder = Path(folder)
    config = read_config(folder)
    if folder.resolve() not in [adapter.resolve() for adapter in adapters]:
        refuse_adapter(folder)
    weights = find_weights(folder, config, remote.names if remote else ())
    sources = tuple(
        remote.open(file.name) if remote and file.name in remote.names else SourceFile(file) for file in weights.files
    )
    read = read_safetensors if weights.files[0].suffix == ".safetensors" else read_torch
    checkpoint = _usable(folder, config, _gather(sources, weights.index, read))
    notes = tuple(text for text in (weights.note, *checkpoint.notes) if text)
    return replace(checkpoint, files=sources, notes=notes, remote=remote)


def _usable(folder: Path, config: ConfigFile, saved: dict[str, Tensor]) -> Checkpoint:
    """The weights under their names in transformers, with notes. Raises YarnEdgeError for what cannot be read as floats."""
    source = str(folder)
    refuse_unmerged(source, saved)
    computed = [name for name, tensor in saved.items() if is_computed(name, tensor.shape)]
    read = dequantized(config, source, {name: tensor for name, tensor in saved.items() if name not in computed})
    weights = read.tensors
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
    kept = [f"note: {len(packed)} tensors are {PACKED}: every file has them as they are"] if packed else []
    notes = kept or list(read.notes) or [left_over_note(config)]
    if wrapper:
        notes.append(f"note: the names of all tensors begin with {one_line(wrapper, 60)}: read without it")
    if computed:
        notes.append(f"note: saved buffers that are not weights are left out: {one_line(', '.join(computed), 100)}")
    tensors = {known: weights[name] for known, name in names.items()}
    return Checkpoint(folder, config, tensors, notes=tuple(notes), quantization=read.what)


def _gather(
    sources: tuple[ByteSource, ...], weight_map: dict[str, str] | None, read: Callable[[ByteSource], dict[str, Tensor]]
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


def read_safetensors(source: ByteSource) -> dict[str, Tensor]:
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
        item = item_bytes(dtype) if isinstance(dtype, str) else None
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
        tensors[name] = Tensor(name, dtype, tuple(shape), _reader(source, base + begin), source.place(base + begin))
    if base + covered != size:
        raise bad(f"{size - base - covered} bytes after the last tensor")
    return tensors


def _reader(source: ByteSource, start: int) -> Callable[[int, Any], None]:
    return lambda offset, buffer: source.read_into(buffer, start + offset)


def _offsets(entry: Any) -> tuple[int, int] | None:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1]:
        return span[0], span[1]
    return None


def read_torch(source: ByteSource) -> dict[str, Tensor]:
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
    names = {getattr(torch, theirs): ours for theirs, ours in _TORCH.items() if hasattr(torch, theirs)}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key)
        if not isinstance(value, torch.Tensor):
            raise YarnEdgeError(
                f"{path}: {one_line(name, 100)} is a {type(value).__name__}, not a tensor; supported: {', '.join(DTYPES)}"
            )
        dtype = names.get(value.dtype, str(value.dtype).removeprefix("torch."))
        bits = value.detach().contiguous() if value.dtype in names else torch.empty(0)
        held = bits.reshape(-1).view(torch.uint8).numpy()
        tensors[name] = Tensor(name, dtype, tuple(value.shape), _copier(source, held))
    return tensors


def _copier(source: ByteSource, data: npt.NDArray[np.uint8]) -> Callable[[int, Any], None]:
    """A reader of a mapped tensor. It checks the file first, so that a file shrinking is a danger only for a moment."""

    def read(offset: int, buffer: Any) -> None:
        source.check_unchanged()
        buffer[:] = data[offset : offset + len(buffer)]

    return read
