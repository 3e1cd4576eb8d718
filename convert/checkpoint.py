"""The tensors and the config of a Hugging Face checkpoint folder, whatever its shards, memory-mapped.

safetensors (one file, or shards with an index) is read here directly: its header is a length and a JSON object, and
bfloat16, which NumPy does not have, stays raw until it is needed. `pytorch_model*.bin` goes through torch, when it is
installed, with weights_only. Format: github.com/huggingface/safetensors, README.
"""

from __future__ import annotations

import json
import math
import mmap
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.config_file import POINTER, ConfigFile, read_config, read_json, refuse_pointer
from yarn_edge.errors import YarnEdgeError, one_line, os_error

MAX_DIMS = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
# safetensors dtype -> (NumPy dtype that holds its bits, is it bfloat16?)
DTYPES: dict[str, tuple[str, bool]] = {"F32": ("<f4", False), "F16": ("<f2", False), "BF16": ("<u2", True)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint. `raw` maps the file: bits of dtype F32, F16, or BF16 (as uint16)."""

    name: str
    dtype: str
    raw: npt.NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the checkpoint has it."""
        return self.raw.shape

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return int(self.raw.nbytes)

    def float32(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Rows [start, stop) of the first dimension as float32, a copy (exact for every dtype)."""
        return to_float32(self.raw[start:stop], self.dtype)


def to_float32(raw: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float32]:
    """Bits of dtype F32, F16 or BF16 as float32, exactly."""
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and weights. `tensors` by name, in the order of the files."""

    path: Path
    config: ConfigFile
    tensors: Mapping[str, Tensor]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder and check that all of its tensors are really there. No weights are read."""
    folder = Path(folder)
    config = read_config(folder)
    for index_name, pattern, read in FORMATS:
        located = _shards(folder, index_name, pattern)
        if located is not None:
            return Checkpoint(folder, config, _gather(*located, read))
    raise YarnEdgeError(f"{folder}: has no model*.safetensors and no pytorch_model*.bin")


def _shards(folder: Path, index_name: str, pattern: str) -> tuple[list[Path], dict[str, str] | None] | None:
    """(files, weight map of the index if there is one), or None where nothing of this kind is there."""
    index = folder / index_name
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise YarnEdgeError(f"{index}: weight_map is missing or not an object of names")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise YarnEdgeError(f"{index}: weight_map names {one_line(name, 100)}, which is outside the folder")
            if not (folder / name).exists():
                raise YarnEdgeError(f"{folder / name}: missing shard, named by {index.name}")
        whole = index_name.removesuffix(".index.json")
        if (folder / whole).exists() and whole not in names:
            raise YarnEdgeError(
                f"{folder}: has {whole} and other files named by {index_name}: remove the set not meant"
            )
        return [folder / name for name in names], weight_map
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        raise YarnEdgeError(f"{folder}: {len(files)} files match {pattern}, but {index_name} is missing")
    return (files, None) if files else None


def _gather(
    files: list[Path], weight_map: dict[str, str] | None, read: Callable[[Path], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of all files; none twice, and where there is an index, each in the file that it names."""
    tensors: dict[str, Tensor] = {}
    homes: dict[str, Path] = {}
    for file in files:
        for name, tensor in read(file).items():
            if name in tensors:
                raise YarnEdgeError(f"{file}: tensor {one_line(name, 100)} is also in {homes[name].name}")
            tensors[name], homes[name] = tensor, file
    if weight_map is None:
        return tensors
    by_name = {file.name: file for file in files}
    for name, home in weight_map.items():
        if name not in homes or homes[name].name != home:
            raise YarnEdgeError(f"{by_name[home]}: tensor {one_line(name, 100)} is missing, though the index names it")
    for name, file in homes.items():
        if name not in weight_map:
            raise YarnEdgeError(f"{file}: tensor {one_line(name, 100)} is not in the index")
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, mapped, not read. Every offset is checked against the file's size."""

    def bad(what: str) -> YarnEdgeError:
        return YarnEdgeError(f"{path}: not a valid safetensors file: {one_line(what, 200)}")

    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise bad(f"{size} bytes")
            refuse_pointer(path, file.read(len(POINTER)))
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise bad(f"truncated: its header claims {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise os_error(error, path) from error
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
            raise bad(f"tensor {name} has no proper dtype, shape and data_offsets")
        if len(shape) > MAX_DIMS or any(n > size for n in shape):
            raise bad(f"tensor {name} has the shape {shape[:8]}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise YarnEdgeError(
                f"{path}: tensor {one_line(name, 100)} has dtype {one_line(str(dtype), 20)}; supported: {', '.join(DTYPES)}"
            )
        numpy_dtype = np.dtype(DTYPES[dtype][0])
        begin, end = span
        if base + end > size:
            raise YarnEdgeError(
                f"{path}: truncated: tensor {one_line(name, 100)} ends at byte {base + end}, the file at {size}"
            )
        if begin != covered or end - begin != math.prod(shape) * numpy_dtype.itemsize:
            raise bad(f"tensor {name} of shape {shape} and dtype {dtype} does not fill bytes {begin} to {end}")
        covered = end
        raw = np.frombuffer(data, numpy_dtype, math.prod(shape), base + begin).reshape(shape)
        tensors[name] = Tensor(name, dtype, raw)
    if base + covered != size:
        raise bad(f"{size - base - covered} bytes after the last tensor")
    return tensors


def _offsets(entry: Any) -> tuple[int, int] | None:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) and 0 <= span[0] <= span[1]:
        return span[0], span[1]
    return None


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of one pytorch_model*.bin, mapped where its format allows, through torch with weights_only."""
    try:
        import torch
    except ImportError as error:
        raise YarnEdgeError(
            f"{path}: pytorch_model.bin needs torch: pip install 'yarn-edge[hf]', or save the model as safetensors"
        ) from error
    try:
        mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote another format, which cannot be mapped
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
        if not isinstance(value, torch.Tensor) or value.dtype not in names:
            kind = getattr(value, "dtype", type(value).__name__)
            raise YarnEdgeError(f"{path}: {one_line(name, 100)} is a {kind}; supported: {', '.join(DTYPES)}")
        dtype = names[value.dtype]
        bits = value.detach().contiguous()
        tensors[name] = Tensor(name, dtype, bits.view(torch.uint16).numpy() if dtype == "BF16" else bits.numpy())
    return tensors


# Index, files, reader: the first that a folder has is taken, in the order of transformers.
FORMATS: tuple[tuple[str, str, Callable[[Path], dict[str, Tensor]]], ...] = (
    ("model.safetensors.index.json", "model*.safetensors", read_safetensors),
    ("pytorch_model.bin.index.json", "pytorch_model*.bin", read_torch),
)
