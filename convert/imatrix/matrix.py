"""The importance matrix: how much each input of a weight matrix is used, in the formats of llama.cpp's programs.

For every matrix, the squares of its inputs are summed over the tokens of a text. A quantizer weights the rounding error of a
column by their mean. GGUF is read and written, the .dat format from before 2025 only read. Sources in llama.cpp:
tools/imatrix/imatrix.cpp (save_imatrix), common/imatrix-loader.cpp, tools/quantize/quantize.cpp (load_imatrix).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.header import pack_key, pack_strings, write_arrays
from yarn_edge.gguf.read import MAGIC, read_gguf
from yarn_edge.regular_file import open_regular

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS_SUFFIX, COUNTS_SUFFIX = ".in_sum2", ".counts"
OWN_KEYS = "yarn_edge.imatrix."
_LEGACY_ENTRY_BYTES = 4 + 4 + 4 + 4  # length of the name, calls, number of values, and one value


@dataclass(frozen=True)
class Importance:
    """The inputs of one weight tensor.

    sums: (n_expert, width) sums of squares. A dense matrix is one expert; for a 3-D tensor, its width holds all matrices one
    after another. counts: (n_expert,) tokens that were summed.
    """

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    def weights(self) -> npt.NDArray[np.float32]:
        """Mean squares, flat (n_expert * width,), 1 for experts without a token: what llama-quantize passes to its kernels."""
        counts = self.counts.astype(np.float32)[:, None]
        means = self.sums.astype(np.float32) / np.where(counts > 0, counts, np.float32(1))
        return np.where(counts > 0, means, np.float32(1)).ravel()

    def __add__(self, other: Importance) -> Importance:
        """The importance over both texts together. Raises ValueError for different shapes."""
        if self.sums.shape != other.sums.shape:
            raise ValueError(f"inputs of shape {self.sums.shape} and {other.sums.shape} do not add up")
        return Importance(self.sums + other.sums, self.counts + other.counts)


@dataclass(frozen=True)
class ImportanceMatrix:
    """An importance matrix: `entries` by the name of the weight, from `chunk_count` chunks of `chunk_size` tokens.

    datasets: names of the texts. chunk_size: 0 if read from a .dat, which does not record it. run: in the file of an unfinished
    run, what identifies that run (`yarn_edge.convert.imatrix.progress`); else empty.
    """

    path: Path | None
    entries: Mapping[str, Importance]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    run: Mapping[str, str | int | bool] = field(default_factory=dict)


def write_imatrix(matrix: ImportanceMatrix, path: Path) -> None:
    """Write a GGUF, byte for byte as llama-imatrix writes these numbers (with more keys only for an unfinished run)."""
    entries = [
        pack_key("general.type", "imatrix"),
        pack_strings(DATASETS, matrix.datasets),
        pack_key(CHUNK_COUNT, matrix.chunk_count),
        pack_key(CHUNK_SIZE, matrix.chunk_size),
        *(pack_key(OWN_KEYS + name, value) for name, value in matrix.run.items()),
    ]
    arrays = {}
    for name, importance in sorted(matrix.entries.items()):
        dense = len(importance.counts) == 1  # ggml omits trailing dimensions of 1
        with np.errstate(over="ignore"):
            sums = importance.sums.astype(np.float32)
        if not np.isfinite(sums).all():
            raise YarnEdgeError(f"{path}: {name} has sums of squares that float32 cannot hold")
        counts = importance.counts.astype(np.float32)
        arrays[name + SUMS_SUFFIX] = sums[0] if dense else sums
        arrays[name + COUNTS_SUFFIX] = counts if dense else counts[:, None]
    write_arrays(path, entries, arrays)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read a GGUF or a .dat and check all of it. Raises YarnEdgeError for the first thing that is wrong."""
    path = Path(path)
    try:
        with open_regular(path) as file:
            is_gguf = file.read(len(MAGIC)) == MAGIC
            if not is_gguf:
                file.seek(0, 2)
                if file.tell() < 4 + _LEGACY_ENTRY_BYTES:
                    raise YarnEdgeError(
                        f"{path}: not an importance matrix: its {file.tell()} bytes are too few for one entry"
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    return _Legacy(path, data).read()
    except OSError as error:
        raise os_error(error, path) from error
    return _from_gguf(read_gguf(path))


def _from_gguf(file: GGUFFile) -> ImportanceMatrix:
    halves: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        for suffix in (SUMS_SUFFIX, COUNTS_SUFFIX):
            if name.endswith(suffix):
                halves.setdefault(name.removesuffix(suffix), {})[suffix] = tensor
    kind = file.metadata.get("general.type", "imatrix")
    if not halves or kind != "imatrix":
        raise YarnEdgeError(
            f"{file.path}: not an importance matrix: general.type is {one_line(repr(kind), 60)}, "
            f"{len(halves)} of {len(file.tensors)} tensors are sums of squares"
        )
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):
        if key not in file.metadata:
            raise YarnEdgeError(f"{file.path}: {key} is missing, and llama-quantize refuses a file without it")
    datasets = file.metadata[DATASETS]
    if not isinstance(datasets, list):
        raise YarnEdgeError(f"{file.path}: {DATASETS} is {one_line(repr(datasets), 60)}, not a list of names")
    entries = {name: _entry(file.path, name, pair) for name, pair in halves.items()}
    run = {key.removeprefix(OWN_KEYS): value for key, value in file.metadata.items() if key.startswith(OWN_KEYS)}
    return ImportanceMatrix(
        file.path, entries, tuple(datasets), _whole(file, CHUNK_COUNT), _whole(file, CHUNK_SIZE), run=run
    )


def _whole(file: GGUFFile, key: str) -> int:
    value = file.metadata[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise YarnEdgeError(f"{file.path}: {key} is {one_line(repr(value), 60)}, not a 32-bit number")
    return value


def _entry(path: Path, name: str, halves: Mapping[str, TensorInfo]) -> Importance:
    name = one_line(name, 100)
    for suffix in (SUMS_SUFFIX, COUNTS_SUFFIX):
        if suffix not in halves:
            raise YarnEdgeError(f"{path}: {name} has no tensor {name}{suffix}")
        if halves[suffix].type_name != "F32":
            raise YarnEdgeError(f"{path}: tensor {name}{suffix} is {halves[suffix].type_name}, not F32")
    sums, counts = halves[SUMS_SUFFIX], halves[COUNTS_SUFFIX]
    if sums.n_elements % counts.n_elements:
        raise YarnEdgeError(f"{path}: {name} has {sums.n_elements} sums for {counts.n_elements} experts")
    values = [_checked(path, name, _values(path, half)) for half in (sums, counts)]
    if values[1].max() >= 2**63:
        raise YarnEdgeError(f"{path}: {name} has a count of {values[1].max():g} tokens")
    whole = np.floor(values[1] + 0.5).astype(np.int64)  # std::lround
    return Importance(values[0].reshape(len(whole), -1), whole)


def _values(path: Path, tensor: TensorInfo) -> npt.NDArray[np.float32]:
    with open_regular(tensor.path) as file:
        file.seek(tensor.offset)
        values = np.fromfile(file, "<f4", tensor.n_elements)
    if len(values) != tensor.n_elements:
        raise YarnEdgeError(f"{path}: was truncated while it was read")
    return values


def _checked(path: Path, name: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    if not np.isfinite(values).all() or values.min() < 0:
        raise YarnEdgeError(f"{path}: {name} has values that are negative, infinite or NaN")
    return values.astype(np.float64)


class _Legacy:
    """The format before GGUF: little-endian int32 and float32 in sequence, not aligned, without a magic number.

    n_entries, then for each entry: length and bytes of its name, n_calls, n_values, values (mean squares * n_calls). At the
    end, unless omitted: chunks, length and bytes of the text's name.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> YarnEdgeError:
        return YarnEdgeError(f"{self.path}: not an importance matrix, neither GGUF nor .dat: {what}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def int32(self, what: str, low: int, high: int) -> int:
        """A number that must be from `low` to `high`, limits that follow from the file's size."""
        if self.left < 4:
            raise self.fail(f"it ends before the {what}")
        (value,) = struct.unpack_from("<i", self.data, self.at)
        if not low <= value <= high:
            raise self.fail(f"{what} at byte {self.at} is {value}, with {self.left - 4} bytes left")
        self.at += 4
        return int(value)

    def text(self, length: int) -> str:
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.split(b"\0", 1)[0].decode("utf-8", errors="surrogateescape")  # C strings

    def read(self) -> ImportanceMatrix:
        entries: dict[str, Importance] = {}
        for _ in range(self.int32("number of entries", 1, self.left // _LEGACY_ENTRY_BYTES)):
            name = self.text(self.int32("length of a name", 1, self.left - 4))
            shown = one_line(name, 100)
            if name in entries:
                raise self.fail(f"{shown} appears twice")
            calls = self.int32(f"number of calls of {shown}", -(2**31), 2**31 - 1)
            n_values = self.int32(f"number of values of {shown}", 1, (self.left - 4) // 4)
            sums = _checked(self.path, shown, np.frombuffer(self.data[self.at : self.at + 4 * n_values], "<f4"))
            self.at += 4 * n_values
            # Without calls, llama-quantize uses the values unchanged.
            entries[name] = Importance(sums[None], np.array([max(calls, 0) or 1], np.int64))
        chunks = 0
        datasets: tuple[str, ...] = ()
        if self.left:
            chunks = self.int32("number of chunks", 0, 2**31 - 1)
        if self.left:
            length = self.int32("length of the text's name", 0, self.left - 4)
            datasets = (self.text(length),) if length else ()
        if self.left:
            raise self.fail(f"{self.left} bytes are left at the end")
        return ImportanceMatrix(self.path, entries, datasets, chunks, 0)
