"""GGUFs packed by hand, byte by byte, for what no writer produces. `gguf_files` writes well-formed ones."""

from __future__ import annotations

import struct
from pathlib import Path

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def kv(key: str | bytes, kind: int, value) -> bytes:
    body = text(value) if kind == STRING else value if kind == ARRAY else struct.pack("<" + PACK[kind], value)
    return text(key) + struct.pack("<I", kind) + body


def array(inner: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", inner, count) + body


def tensor(name="a", shape=(32,), kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def image(kvs=(), tensors=(), data=b"", version=3, n_kvs=None, n_tensors=None, magic=b"GGUF", alignment=32) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kvs is None else n_kvs)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if tensors else head


def edit_key(path: Path, key: str, value: float | str | bool) -> None:
    """Overwrite one scalar (or a string of the same length) of a GGUF's metadata in place."""
    data = path.read_bytes()
    name = struct.pack("<Q", len(key)) + key.encode()
    assert data.count(name) == 1, key
    at = data.index(name) + len(name)
    (kind,) = struct.unpack_from("<I", data, at)
    at += 4
    if kind == 8:
        assert isinstance(value, str)
        (length,) = struct.unpack_from("<Q", data, at)
        assert length == len(value.encode())
        packed, at = value.encode(), at + 8
    else:
        packed = struct.pack({4: "<I", 5: "<i", 6: "<f", 7: "<?", 12: "<d"}[kind], value)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(packed)
