"""GGUFs packed by hand for tests, byte by byte, and real ones split by gguf-py's own writer."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf

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


def split(source: Path, target: Path, max_tensors: int, **options) -> list[Path]:
    """`source` as shards TARGET-00001-of-0000N.gguf of at most `max_tensors` tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama", split_max_tensors=max_tensors, **options)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf"))
