"""Rewriting the header of a GGUF: keys set or removed, small float32 tensors set, everything else byte for byte.

Keys that stay keep their raw bytes and their order, tensor infos are copied raw, and the tensor data goes from file to
file inside the kernel (`kernel_copy`). A filler key keeps the data at the same place within blocks of 4096 bytes, so that
file systems which share blocks can. Offsets stay contiguous and in order, as llama.cpp demands (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf_file import ARRAY, HEADER_BYTES, MAGIC, STRING, GGUFFile, SkippedStrings, TensorInfo

from .kernel_copy import BLOCK, copy_range, write_at

PADDING_KEY = "yarn_edge.padding"
FIXED_KEYS = frozenset({"general.alignment", "split.no", "split.count", "split.tensors.count"})  # data hangs on them
MAX_NAME_BYTES = 63  # ggml.h: GGML_MAX_NAME, with its NUL
Vector = npt.NDArray[np.float32]
_U32, _I32, _F32, _BOOL, _F64, _F32_TENSOR = 4, 5, 6, 7, 12, 0
_FORMATS = {_U32: "<I", _I32: "<i", _F32: "<f", _BOOL: "<?", _F64: "<d"}
_KIND_NAMES = (
    "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array", "uint64", "int64", "float64",
)  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """What to change in one file. `raw_keys`: whole packed entries, for keys whose type must stay. `flush`: wait for the disk."""

    set_keys: Mapping[str, Any]
    remove_keys: Collection[str]
    set_tensors: Mapping[str, Vector]
    raw_keys: Mapping[str, bytes]
    flush: bool = True


def edit_gguf(
    source: GGUFFile,
    output: Path,
    *,
    set_keys: Mapping[str, Any],
    remove_keys: Collection[str] = (),
    set_tensors: Mapping[str, Vector] | None = None,
    advance: Callable[[float], None] = lambda _bytes: None,
    flush: bool = True,
) -> list[str]:
    """Write `source`, a GGUF of one file, to the new file `output` with its header edited; with `flush` it is on the disk then.

    set_keys: values by key; int -> uint32, float -> float32 (float64 under yarn_edge.), bool, str, lists by their first
    item. set_tensors: float32 vectors; one that exists must be F32 of that length, a new one becomes the last tensor.
    Bytes behind the last tensor stay, unless a tensor is added. Returns one sentence for each change, such as
    "llama.rope.scaling.attn_factor: absent -> 1.1857". Raises YarnEdgeError if the source changed since it was read, or
    lies so that llama.cpp cannot load it; OSError on a full disk. The caller removes `output` on errors, and publishes it.
    """
    if len(source.shards) > 1:
        raise ValueError(f"{source.path}: is split; edit_gguf_files edits all its shards")
    return write_edited(source, output, Edit(set_keys, remove_keys, set_tensors or {}, {}, flush), advance)


def write_edited(source: GGUFFile, output: Path, edit: Edit, advance: Callable[[float], None]) -> list[str]:
    """`edit_gguf` for one file of a model, split or not: `source` as `read_shard` gives it."""
    check_edit(source, edit)
    own = [t for t in source.tensors.values() if t.path == source.path]
    _check_contiguous(source, own)
    with open_source(source) as raw, output.open("wb", buffering=0) as target:
        changes = _write(source, own, edit, raw, target, advance)
        check_unchanged(source, raw)
        if edit.flush:
            os.fsync(target.fileno())
    return changes


def open_source(source: GGUFFile) -> io.FileIO:
    """The file of a header, open for reading. Raises YarnEdgeError if it is not the file that was read any more."""
    try:
        file = io.FileIO(source.path)
    except OSError as error:
        raise os_error(error, source.path) from error
    try:
        check_unchanged(source, file)
    except BaseException:
        file.close()
        raise
    return file


def check_unchanged(source: GGUFFile, file: io.FileIO) -> None:
    """Raise YarnEdgeError if the open file is no longer the one whose header was read."""
    state = os.fstat(file.fileno())
    if (state.st_size, state.st_mtime_ns) != (source.file_bytes, source.mtime_ns):
        raise changed(source.path)


def changed(path: Path) -> YarnEdgeError:
    """What a source gets whose size or time is not that of its header any more."""
    return YarnEdgeError(f"{path}: was changed while it was read; run this again when it is complete")


def check_edit(source: GGUFFile, edit: Edit) -> None:
    """Refuse an edit that cannot be made, before any work."""
    both = FIXED_KEYS & (edit.set_keys.keys() | set(edit.remove_keys))
    if both or PADDING_KEY in edit.set_keys:
        raise ValueError(f"{', '.join(both) or PADDING_KEY}: is not for callers to set")
    for name, values in edit.set_tensors.items():
        if values.dtype != np.float32 or values.ndim != 1 or not values.size:
            raise ValueError(f"tensor {name}: {values.dtype} of shape {values.shape}, need a float32 vector")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"tensor {name}: its name is longer than {MAX_NAME_BYTES} bytes")
        there = source.tensors.get(name)
        if there is not None and (there.type_name, there.shape) != ("F32", values.shape):
            raise YarnEdgeError(
                f"{there.path}: tensor {one_line(name, 100)} is {there.type_name} of shape {list(there.shape)}; "
                f"only a vector of {values.size} F32 values can be replaced"
            )


def _check_contiguous(source: GGUFFile, tensors: list[TensorInfo]) -> None:
    """One tensor after the other, in the order of their headers: else llama.cpp refuses the file, edited or not."""
    at = source.data_offset
    for tensor in tensors:
        if tensor.offset != at:
            raise YarnEdgeError(
                f"{source.path}: tensor {one_line(tensor.name, 100)} lies at byte {tensor.offset}, llama.cpp expects it at "
                f"{at}: the file is damaged"
            )
        at = _aligned(tensor.offset + tensor.n_bytes, source.alignment)


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _write(
    source: GGUFFile, own: list[TensorInfo], edit: Edit, raw: io.FileIO, target: io.FileIO, advance: Callable[[float], None]
) -> list[str]:  # fmt: skip
    """Header, data, new tensors. Returns the sentences."""
    header = _read(source, raw, 0, source.header_end)
    entries, changes = _edited_keys(source, header, edit)
    keys_end = max((entry.end for entry in source.entries.values()), default=HEADER_BYTES)
    present = {tensor.name: tensor for tensor in own}
    new = {name: values for name, values in edit.set_tensors.items() if name not in present}
    end = own[-1].offset + own[-1].n_bytes if own else source.data_offset
    infos, at = [header[keys_end:]], _aligned(end, source.alignment)
    appended: list[tuple[int, Vector]] = []
    for name, values in new.items():
        infos.append(_tensor_info(name, values, at - source.data_offset))
        appended.append((at, values))
        at = _aligned(at + values.nbytes, source.alignment)
        changes.append(f"tensor {name}: absent -> {_shown_vector(values)}")

    data_start = source.data_offset if own or new else source.header_end
    stop = end if new else max(source.file_bytes, data_start)
    body = b"".join(infos)
    filler = _filler(len(b"".join(entries)) + len(body), source) if own else b""
    entries += [filler] if filler else []
    counts = struct.pack("<IQQ", source.version, len(own) + len(new), len(entries))
    packed = b"".join((MAGIC, counts, *entries, body))
    if own or new:
        packed += bytes(-len(packed) % source.alignment)
    moved = len(packed) - data_start

    write_at(target, 0, packed)
    if own or not new:
        copy_range(raw, target, data_start, data_start + moved, stop - data_start, advance, edit.flush)
    for offset, values in appended:
        written = target.seek(0, os.SEEK_END)
        write_at(target, written, bytes(offset + moved - written) + _bytes(values, source.alignment))
    for name, values in edit.set_tensors.items():
        if name in present:
            tensor = present[name]
            old = np.frombuffer(_read(source, raw, tensor.offset, tensor.n_bytes), "<f4")
            if old.tobytes() != values.astype("<f4").tobytes():
                write_at(target, tensor.offset + moved, values.astype("<f4").tobytes())
                changes.append(f"tensor {name}: {_shown_vector(old)} -> {_shown_vector(values)}")
    return changes


def _read(source: GGUFFile, raw: io.FileIO, at: int, n_bytes: int) -> bytes:
    raw.seek(at)
    data = raw.read(n_bytes)
    if len(data) != n_bytes:
        raise changed(source.path)
    return data


def _filler(n_bytes: int, source: GGUFFile) -> bytes:
    """The padding key's entry that puts the data where it lay within a block; nothing where it lies so by itself.

    n_bytes: of all keys and tensor infos without it.
    """
    length = HEADER_BYTES + n_bytes
    if (_aligned(length, source.alignment) - source.data_offset) % BLOCK == 0:
        return b""
    empty = len(pack_key(PADDING_KEY, ""))
    return pack_key(PADDING_KEY, " " * ((source.data_offset - length - empty) % BLOCK))


def _tensor_info(name: str, values: Vector, offset: int) -> bytes:
    return _string(name) + struct.pack("<IQIQ", 1, values.size, _F32_TENSOR, offset)


def _bytes(values: Vector, alignment: int) -> bytes:
    data = values.astype("<f4").tobytes()
    return data + bytes(-len(data) % alignment)


def _edited_keys(source: GGUFFile, header: bytes, edit: Edit) -> tuple[list[bytes], list[str]]:
    """The packed entries in their order, and a sentence for each that changed."""
    wanted = {key: pack_key(key, value) for key, value in edit.set_keys.items()} | dict(edit.raw_keys)
    entries: list[bytes] = []
    changes: list[str] = []
    for key, entry in source.entries.items():
        old = header[entry.start : entry.end]
        if key == PADDING_KEY:
            continue
        if key in wanted:
            packed = wanted.pop(key)
            entries.append(packed)
            if packed != old and key not in edit.raw_keys:
                changes.append(_change(key, source.metadata[key], entry.kind, edit.set_keys[key], packed))
        elif key in edit.remove_keys:
            changes.append(f"{one_line(key, 100)}: {_shown(source.metadata[key], entry.kind)} -> absent")
        else:
            entries.append(old)
    for key, packed in wanted.items():
        entries.append(packed)
        changes.append(f"{key}: absent -> {_shown(edit.set_keys[key], _kind_of(key, packed))}")
    return entries, changes


def _kind_of(key: str, packed: bytes) -> int:
    return int(struct.unpack_from("<I", packed, 8 + len(key.encode()))[0])


def _change(key: str, old: Any, old_kind: int, new: Any, packed: bytes) -> str:
    kind = _kind_of(key, packed)
    before, after = _shown(old, old_kind), _shown(new, kind)
    if before == after and kind == old_kind:
        after += " with other values"
    elif before == after:
        before, after = f"{before} ({_KIND_NAMES[old_kind]})", f"{after} ({_KIND_NAMES[kind]})"
    return f"{key}: {before} -> {after}"


def _shown(value: Any, kind: int) -> str:
    """A value for people: float32 in as few digits as tell it apart, long ones cut."""
    if kind == _F32:
        return str(np.float32(value))
    if isinstance(value, SkippedStrings):
        return f"{value.count} strings"
    if kind == ARRAY:
        items = list(value[:4])
        return (
            f"{one_line(', '.join(map(str, items)), 60)}{' …' if len(value) > len(items) else ''} ({len(value)} values)"
        )
    return one_line(str(value) if kind != STRING else repr(value), 80)


def _shown_vector(values: npt.NDArray[Any]) -> str:
    return f"{values.size} values from {values.min():g} to {values.max():g}"


def _string(text: str) -> bytes:
    data = text.encode("utf-8", errors="surrogateescape")
    return struct.pack("<Q", len(data)) + data


def pack_key(key: str, value: Any) -> bytes:
    """A key's entry: its name, type and value. Types as in `edit_gguf`. Raises ValueError for what no type holds."""
    own = key.startswith("yarn_edge.")
    if isinstance(value, (list, tuple)):
        kind = _scalar_kind(key, value[0], own, _I32) if value else None
        if kind is None or any(_scalar_kind(key, item, own, _I32) != kind for item in value):
            raise ValueError(f"{key}: {value!r} has no GGUF type: need items of one type")
        return (
            _string(key) + struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_packed(key, v, kind) for v in value)
        )
    kind = _scalar_kind(key, value, own, _U32)
    return _string(key) + struct.pack("<I", kind) + _packed(key, value, kind)


def _scalar_kind(key: str, value: Any, own: bool, integer: int) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return integer
    if isinstance(value, float):
        return _F64 if own else _F32
    if isinstance(value, str):
        return STRING
    raise ValueError(f"{key}: {type(value).__name__} has no GGUF type")


def _packed(key: str, value: Any, kind: int) -> bytes:
    if kind == STRING:
        return _string(value)
    try:
        return struct.pack(_FORMATS[kind], value)
    except (OverflowError, struct.error) as error:
        raise ValueError(f"{key}: {value!r} does not fit into {_KIND_NAMES[kind]}") from error
