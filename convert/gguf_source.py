"""A GGUF as something to quantize."""

from __future__ import annotations

from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.runtime.ggml_types import GGMLType, types
from yarn_edge.source_file import SourceFile

from .file_plan import Source
from .one_pass import SourceTensor

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def gguf_source(file: GGUFFile) -> Source:
    """A GGUF, split or not, as a source to quantize. Its files stay open."""
    files = {
        path: SourceFile(path, size=file.file_bytes, mtime_ns=file.mtime_ns) if path == file.path else SourceFile(path)
        for path in file.shards
    }
    kinds = types()
    tensors = []
    for info in file.tensors.values():
        if info.type_name not in kinds:
            raise YarnEdgeError(
                f"{info.path}: tensor {one_line(info.name, 100)} has the type {info.type_name}, which ggml does not know"
            )
        tensors.append(_gguf_tensor(info, kinds[info.type_name], files[info.path]))
    header = files[file.path].read(file.header_end)
    entries = {key: header[e.start : e.end] for key, e in file.entries.items() if key not in _SPLIT_KEYS}

    def check_unchanged() -> None:
        for opened in files.values():
            opened.check_unchanged()

    return Source(file.path, entries, tensors, {t.name: t.kind for t in tensors}, file.alignment, check_unchanged)


def _gguf_tensor(info: TensorInfo, kind: GGMLType, file: SourceFile) -> SourceTensor:
    row_bytes = kind.row_bytes(info.shape[0])

    def read(first_row: int, out: Any) -> None:
        file.read_into(out, info.offset + first_row * row_bytes)

    return SourceTensor(info.name, info.shape, kind, read, f"{info.path}: tensor {one_line(info.name, 100)}")
