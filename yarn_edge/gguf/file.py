"""A parsed GGUF header as values: its keys, its tensors, and where each of them is in the file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.regular_file import open_regular


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's info. shape: in GGUF order, the contiguous dimension first. offset: in bytes from the start of `path`."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    n_bytes: int
    path: Path = field(default=Path(), compare=False)

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class KeyEntry:
    """Where one key is: its GGUF value type, and the bytes [start, end) of the file that hold key, type and value."""

    kind: int
    start: int
    end: int


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header: `metadata` by key (number arrays as NumPy arrays, string arrays as lists), `tensors` by name.

    For a split model, `shards` lists all files in order and `tensors` has the tensors of all; the rest describes the first
    file, `path`. header_end: the byte after the tensor infos. mtime_ns: when the file was last changed before it was read.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_offset: int
    file_bytes: int
    shards: tuple[Path, ...] = ()
    entries: Mapping[str, KeyEntry] = field(default_factory=dict)
    header_end: int = 0
    mtime_ns: int = 0

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as "llama"."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A required string."""
        value = self.metadata.get(key)
        if not isinstance(value, str):
            raise YarnEdgeError(f"{self.path}: {key} is {'missing' if value is None else 'not a string'}")
        return value

    def number(self, name: str, default: float | None = None) -> float | None:
        """`{architecture}.{name}` as a finite number, or `default` if the key is absent."""
        key = f"{self.architecture}.{name}"
        value = self.metadata.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise YarnEdgeError(f"{self.path}: {key} is {one_line(repr(value), 60)}, not a finite number")
        return value

    def required_int(self, name: str) -> int:
        """`{architecture}.{name}`, a required integer above 0."""
        value = self.number(name)
        if value is None and self.metadata.get("general.type") == "adapter":
            raise YarnEdgeError(f"{self.path}: is an adapter, not a model: pass it with --lora to the GGUF of its base")
        if value is None or value != int(value) or value <= 0:
            raise YarnEdgeError(
                f"{self.path}: {self.architecture}.{name} is "
                f"{'missing' if value is None else repr(value)}, need a whole number above 0"
            )
        return int(value)

    def numbers(self, name: str, count: int) -> list[float]:
        """`{architecture}.{name}` as one number for each of `count` layers (or axes), which may be equal; [] if it is absent."""
        value = self.metadata.get(f"{self.architecture}.{name}")
        if isinstance(value, (np.ndarray, tuple)):  # a tuple is of a file to write
            return [float(number) for number in value[:count]]
        one = self.number(name)
        return [] if one is None else [one] * count

    def wrong(self, key: str, expected: str, value: Any = None) -> YarnEdgeError:
        """An error about `key`, or about the `value` that stands for an absent one: what it is and what was expected."""
        given = self.metadata.get(key, value)
        shown = "missing" if given is None else one_line(repr(given), 60)
        if isinstance(given, (list, SkippedStrings)):
            shown = f"an array of {len(given) if isinstance(given, list) else given.count} strings"
        return YarnEdgeError(f"{self.path}: {key} is {shown}; {expected}")

    def float32_tensor(self, name: str, limit: int) -> npt.NDArray[np.float32]:
        """The values of a small vector. Raises YarnEdgeError if it is missing, not an F32 vector, or longer than `limit`."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise YarnEdgeError(f"{self.path}: tensor {one_line(name, 100)} is missing")
        if tensor.type_name != "F32" or len(tensor.shape) != 1 or tensor.n_elements > limit:
            raise YarnEdgeError(
                f"{tensor.path}: tensor {one_line(name, 100)} is {tensor.type_name} of shape {list(tensor.shape)}, "
                f"not F32 with at most {limit} values"
            )
        try:
            with open_regular(tensor.path) as file:
                file.seek(tensor.offset)
                data = file.read(tensor.n_bytes)
        except OSError as error:
            raise os_error(error, tensor.path) from error
        if len(data) != tensor.n_bytes:
            raise YarnEdgeError(f"{tensor.path}: was truncated while it was read")
        return np.frombuffer(data, "<f4").astype(np.float32)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensor data."""
        return sum(t.n_bytes for t in self.tensors.values())


@contextmanager
def errors_naming(file: GGUFFile) -> Iterator[None]:
    """Errors raised inside name the file, unless they do already."""
    try:
        yield
    except YarnEdgeError as error:
        name = str(file.path)
        raise (error if str(error).startswith(name) else YarnEdgeError(f"{name}: {error}")) from error


@dataclass(frozen=True)
class SkippedStrings:
    """An array of strings that was checked but not kept (`read_gguf` without vocabulary)."""

    count: int
