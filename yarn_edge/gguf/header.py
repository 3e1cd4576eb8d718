"""The header of a GGUF as bytes: keys, tensor infos, and where each tensor's data begins.

Format: ggml/docs/gguf.md. llama.cpp requires more than the format: tensor data must follow the order of the infos, each padded
to the alignment (ggml/src/gguf.cpp). `lay_out` does that by construction.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.gguf.read import ARRAY, DEFAULT_ALIGNMENT, MAGIC, STRING
from yarn_edge.writer import open_output

VERSION = 3
MAX_NAME_BYTES = 63  # ggml.h: GGML_MAX_NAME, with its NUL
U32, I32, F32, BOOL, F64 = 4, 5, 6, 7, 12  # enum gguf_type
F32_TENSOR = 0  # enum ggml_type
_FORMATS = {U32: "<I", I32: "<i", F32: "<f", BOOL: "<?", F64: "<d"}
KIND_NAMES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64", "float64",
)  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """One tensor to write. ne: its shape in ggml's order, row width first. kind: its type in enum ggml_type."""

    name: str
    ne: tuple[int, ...]
    kind: int
    n_bytes: int


@dataclass(frozen=True)
class HeaderLayout:
    """header: padded to where the data begins. offsets: absolute, by tensor name. file_bytes: the size of the whole file."""

    header: bytes
    offsets: Mapping[str, int]
    file_bytes: int


def lay_out(
    entries: Sequence[bytes], tensors: Sequence[TensorSpec], alignment: int = DEFAULT_ALIGNMENT
) -> HeaderLayout:
    """The layout of a file with these packed keys (`pack_key`) and these tensors."""
    infos, relative, at = [], {}, 0
    for tensor in tensors:
        infos.append(tensor_info(tensor.name, tensor.ne, tensor.kind, at))
        relative[tensor.name] = at
        at = aligned(at + tensor.n_bytes, alignment)
    header = pack_header(VERSION, len(tensors), entries, b"".join(infos))
    header += bytes(-len(header) % alignment)
    return HeaderLayout(header, {name: len(header) + start for name, start in relative.items()}, len(header) + at)


def pack_header(version: int, n_tensors: int, entries: Sequence[bytes], infos: bytes) -> bytes:
    """Magic, version, counts, keys, tensor infos; without padding."""
    return b"".join((MAGIC, struct.pack("<IQQ", version, n_tensors, len(entries)), *entries, infos))


def aligned(n: int, alignment: int) -> int:
    """`n` rounded up to a multiple of `alignment`."""
    return -(-n // alignment) * alignment


def tensor_info(name: str, ne: Sequence[int], kind: int, offset: int) -> bytes:
    """One packed tensor info; `offset` counts from where the data begins. Raises ValueError for a name that is too long."""
    if len(name.encode("utf-8", errors="surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"tensor {name}: its name is longer than {MAX_NAME_BYTES} bytes")
    return pack_string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def pack_string(text: str) -> bytes:
    """Length and UTF-8. Surrogates, which stand for bytes that were not UTF-8 when read, become those bytes again."""
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def pack_key(key: str, value: Any) -> bytes:
    """A key's entry: its name, type and value. Raises ValueError for a value that no type holds.

    int becomes uint32, float float32 (float64 under yarn_edge.), bool and str their own types; a list gets the type of its
    first item, int being int32.
    """
    own = key.startswith("yarn_edge.")
    if isinstance(value, (list, tuple)):
        kinds = {_scalar_kind(key, item, own, I32) for item in {type(item): item for item in value}.values()}
        if len(kinds) != 1:
            raise ValueError(
                f"{key}: {_briefly(value)} has no GGUF type: a list must not be empty, and its items must be of one type"
            )
        (kind,) = kinds
        return pack_string(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + _packed_items(key, value, kind)
    kind = _scalar_kind(key, value, own, U32)
    return pack_string(key) + struct.pack("<I", kind) + _packed(key, value, kind)


def pack_strings(key: str, values: Iterable[str]) -> bytes:
    """The entry of an array of strings, which may be empty, unlike `pack_key`'s."""
    packed = [pack_string(value) for value in values]
    return pack_string(key) + struct.pack("<IIQ", ARRAY, STRING, len(packed)) + b"".join(packed)


def _scalar_kind(key: str, value: Any, own: bool, integer: int) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        return integer
    if isinstance(value, float):
        return F64 if own else F32
    if isinstance(value, str):
        return STRING
    raise ValueError(f"{key}: {type(value).__name__} has no GGUF type")


def _packed_items(key: str, values: Sequence[Any], kind: int) -> bytes:
    if kind == STRING:
        try:
            texts = list(map(str.encode, values))
        except UnicodeEncodeError:  # surrogates
            return b"".join(map(pack_string, values))
        lengths = map(struct.Struct("<Q").pack, map(len, texts))
        return b"".join(chain.from_iterable(zip(lengths, texts, strict=True)))
    try:
        return struct.pack(f"<{len(values)}{_FORMATS[kind][1]}", *values)
    except (OverflowError, struct.error):  # one of them does not fit
        return b"".join([_packed(key, item, kind) for item in values])


def _packed(key: str, value: Any, kind: int) -> bytes:
    if kind == STRING:
        return pack_string(value)
    try:
        return struct.pack(_FORMATS[kind], value)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"{key}: {value!r} does not fit in {KIND_NAMES[kind]}") from error


def _briefly(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


def write_arrays(path: Path, entries: Sequence[bytes], arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write a small GGUF of float32 tensors (dimensions in NumPy's order) and flush it: vocabularies, importance matrices."""
    specs = [TensorSpec(name, tuple(reversed(a.shape)), F32_TENSOR, a.nbytes) for name, a in arrays.items()]
    layout = lay_out(entries, specs)
    with io.BufferedWriter(open_output(path)) as file:
        file.write(layout.header)
        for name, array in arrays.items():
            file.seek(layout.offsets[name])
            file.write(np.ascontiguousarray(array, "<f4").tobytes())
        file.truncate(layout.file_bytes)
        file.flush()
        os.fsync(file.fileno())
