"""Reading a GGUF that may be truncated or hostile: every count, length and offset is checked against the file's size.

Memory is allocated only for bytes that the file has. Tensors are described but not read. Files on which llama.cpp would call
abort(), ending Python too, are refused by `yarn_edge.llama_rules.loadable`. Format: ggml's docs/gguf.md, versions 2 and 3. A
model split over several files is read by the name of the first (`yarn_edge.gguf.split`).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf.file import GGUFFile, KeyEntry, SkippedStrings, TensorInfo
from yarn_edge.gguf.split import join_shards
from yarn_edge.gguf.tensor_types import TENSOR_TYPES
from yarn_edge.regular_file import open_regular

MAGIC = b"GGUF"
HEADER_BYTES = 24  # magic, version, tensor count, key count
DEFAULT_ALIGNMENT = 32
MAX_KEY_BYTES = 65535  # docs/gguf.md
MAX_DIMS = 4

# GGUF value type -> NumPy dtype of its scalars; 8 is a string, 9 an array.
SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
STRING, ARRAY = 8, 9
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


class _Cursor:
    """Sequential reads that raise at the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path, mtime_ns: int, keep_strings: bool) -> None:
        self.data, self.path, self.at, self.end, self.mtime_ns = data, path, 0, len(data), mtime_ns
        self.keep_strings = keep_strings

    def fail(self, what: str) -> YarnEdgeError:
        return YarnEdgeError(f"{self.path}: not a valid GGUF: {one_line(what, 200)}")

    def need(self, n_bytes: int, what: str) -> int:
        if n_bytes > self.end - self.at:
            raise self.fail(f"{what} at byte {self.at} needs {n_bytes} bytes, the file has {self.end - self.at} left")
        start = self.at
        self.at += n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(struct.unpack_from("<I", self.data, self.need(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack_from("<Q", self.data, self.need(8, what))[0])

    def string(self, what: str, limit: int | None = None) -> str:
        length = self.u64(what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} of {length} bytes at byte {self.at}, the limit is {limit}")
        start = self.need(length, what)
        return self.data[start : start + length].decode("utf-8", errors="surrogateescape")

    def strings(self, count: int, what: str) -> list[str] | SkippedStrings:
        """`count` strings. The loops are written out because vocabularies have 10^5 of them."""
        data, at, end, strings = self.data, self.at, self.end, []
        if not self.keep_strings and (after := self._after_strings(count)) is not None:
            self.at = after
            return SkippedStrings(count)
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise self.fail(f"{what} ends within its strings")
            (length,) = unpack(data, at)
            at += 8
            if length > end - at:
                raise self.fail(f"{what} has a string of {length} bytes at byte {at}, the file has {end - at} left")
            if self.keep_strings:
                strings.append(data[at : at + length].decode("utf-8", errors="surrogateescape"))
            at += length
        self.at = at
        return strings if self.keep_strings else SkippedStrings(count)

    def _after_strings(self, count: int) -> int | None:
        """The first byte after `count` strings; None if they pass the end of the file."""
        data, at = self.data, self.at
        unpack = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                at += 8 + unpack(data, at)[0]
        except (struct.error, OverflowError):
            return None
        return at if at <= self.end else None

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.data, dtype, 1, self.need(dtype.itemsize, key))[0].item()
        if kind != ARRAY:
            raise self.fail(f"{key} has the unknown value type {kind}")
        inner, count = self.u32(f"type of {key}"), self.u64(f"length of {key}")
        if inner == STRING:
            if count * 8 > self.end - self.at:
                raise self.fail(f"{key} claims {count} strings, the file has {self.end - self.at} bytes left")
            return self.strings(count, key)
        if inner not in SCALARS:
            raise self.fail(f"{key} is an array of the unknown or nested type {inner}")
        dtype = np.dtype(SCALARS[inner])
        return np.frombuffer(self.data, dtype, count, self.need(count * dtype.itemsize, key)).copy()


def read_gguf(path: str | Path, *, vocabulary: bool = True) -> GGUFFile:
    """Parse and check the header of a GGUF; for a split one, given its first shard, the headers of all shards.

    vocabulary: False skips the values of string arrays, which take most of the time. Raises YarnEdgeError for the first thing
    that is wrong.
    """
    return join_shards(read_shard(path, vocabulary=vocabulary), read_shard)


def read_shard(path: str | Path, *, vocabulary: bool = True) -> GGUFFile:
    """Parse and check the header of this one file, even if it is a part of a split model."""
    path = Path(path)
    try:
        if path.is_dir():
            raise YarnEdgeError(f"{path}: is a folder, expected a GGUF file")
        with open_regular(path) as file:
            state = os.fstat(file.fileno())
            if state.st_size < HEADER_BYTES:
                raise YarnEdgeError(f"{path}: not a GGUF: its {state.st_size} bytes are too few for a header")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path, state.st_mtime_ns, vocabulary))
    except (OSError, ValueError) as error:
        raise os_error(error, path) if isinstance(error, OSError) else YarnEdgeError(f"{path}: {error}") from error


def _parse(cursor: _Cursor) -> GGUFFile:
    if cursor.data[:4] != MAGIC:
        raise YarnEdgeError(f"{cursor.path}: not a GGUF: it starts with {bytes(cursor.data[:4])!r}, not {MAGIC!r}")
    cursor.at = 4
    version = cursor.u32("version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
        remedy = "it is big-endian, which is not supported" if swapped else "supported versions are 2 and 3"
        raise cursor.fail(f"version {version}; {remedy}")
    n_tensors, n_keys = cursor.u64("tensor count"), cursor.u64("key count")
    left = cursor.end - cursor.at
    for count, each, what in ((n_tensors, _MIN_TENSOR_BYTES, "tensors"), (n_keys, _MIN_KV_BYTES, "keys")):
        if count * each > left:
            raise cursor.fail(f"claims {count} {what}, the file has {left} bytes left")

    metadata: dict[str, Any] = {}
    entries: dict[str, KeyEntry] = {}
    for _ in range(n_keys):
        start = cursor.at
        key = cursor.string("key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.fail(f"key {key} appears twice")
        kind = cursor.u32(f"type of {key}")
        metadata[key] = cursor.value(key, kind)
        entries[key] = KeyEntry(kind, start, cursor.at)

    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.fail(f"general.alignment is {alignment!r}, not a power of two")
    headers = list(_tensor_headers(cursor, n_tensors))
    data_offset = -(-cursor.at // alignment) * alignment
    tensors = _place(cursor, headers, data_offset, alignment)
    return GGUFFile(
        cursor.path,
        version,
        metadata,
        tensors,
        alignment,
        data_offset,
        cursor.end,
        shards=(cursor.path,),
        entries=entries,
        header_end=cursor.at,
        mtime_ns=cursor.mtime_ns,
    )


def _tensor_headers(cursor: _Cursor, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    for _ in range(count):
        name = cursor.string("tensor name", MAX_KEY_BYTES)
        n_dims = cursor.u32(f"dimensions of {name}")
        if not 0 < n_dims <= MAX_DIMS:
            raise cursor.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(cursor.u64(f"shape of {name}") for _ in range(n_dims))
        yield name, shape, cursor.u32(f"type of {name}"), cursor.u64(f"offset of {name}")


def _place(
    cursor: _Cursor, headers: list[tuple[str, tuple[int, ...], int, int]], data_offset: int, alignment: int
) -> dict[str, TensorInfo]:
    """Sizes and absolute offsets. Checked: known type, whole blocks, aligned, inside the file, no overlap."""
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in headers:
        if name in tensors:
            raise cursor.fail(f"tensor {name} appears twice")
        if kind not in TENSOR_TYPES:
            raise cursor.fail(f"tensor {name} has the unknown type {kind}")
        type_name, block, block_bytes = TENSOR_TYPES[kind]
        if 0 in shape or shape[0] % block:
            raise cursor.fail(f"tensor {name} of type {type_name} has the impossible shape {shape}")
        n_bytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise cursor.fail(f"tensor {name} at offset {offset} is not aligned to {alignment}")
        if data_offset + offset + n_bytes > cursor.end:
            raise YarnEdgeError(
                f"{cursor.path}: truncated: tensor {one_line(name, 100)} ends at byte {data_offset + offset + n_bytes}, "
                f"the file at {cursor.end}"
            )
        tensors[name] = TensorInfo(name, shape, type_name, data_offset + offset, n_bytes, cursor.path)
    end = data_offset
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name} overlaps the one before it")
        end = tensor.offset + tensor.n_bytes
    return tensors
