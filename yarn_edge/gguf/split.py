"""Models split over several GGUFs: how the shards are named, and joining their headers into one.

This refuses what llama.cpp refuses (or aborts on): other types of the split.* keys, other names, a shard that is missing, out
of order or of another model, and a wrong total of tensors. Source: llama-model-loader.cpp, llama_split_path.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import is_named

if TYPE_CHECKING:
    from yarn_edge.gguf.file import GGUFFile, TensorInfo

NO, COUNT, TENSORS_COUNT = "split.no", "split.count", "split.tensors.count"
_KINDS = {NO: (2, "uint16"), COUNT: (2, "uint16"), TENSORS_COUNT: (5, "int32")}
_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def shard_name(stem: str, index: int, count: int) -> str:
    """The file name of shard `index` (from 0) of `count`, such as STEM-00001-of-00003.gguf."""
    return f"{stem}-{index + 1:05d}-of-{count:05d}.gguf"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """(stem, index from 0, count) of a shard's file name; None for any other name."""
    match = _NAME.fullmatch(name)
    return (match["stem"], int(match["no"]) - 1, int(match["count"])) if match else None


def split_number(file: GGUFFile, key: str) -> int | None:
    """The value of a split.* key; None if it is absent. Raises YarnEdgeError for a type that llama.cpp refuses."""
    entry = file.entries.get(key)
    if entry is None:
        return None
    kind, name = _KINDS[key]
    value = file.metadata[key]
    if entry.kind != kind:
        raise YarnEdgeError(f"{file.path}: {key} is {one_line(repr(value), 60)}, need a number of type {name}")
    return int(value)


def join_shards(first: GGUFFile, read: Callable[[Path], GGUFFile]) -> GGUFFile:
    """`first` with the tensors of all shards, or unchanged if it is not split. read: parses one file."""
    count = split_number(first, COUNT) or 0
    if count < 2:
        return first
    stem = _stem_of_first(first, count)
    paths = tuple(first.path.with_name(shard_name(stem, i, count)) for i in range(count))
    tensors: dict[str, TensorInfo] = dict(first.tensors)
    for index, path in enumerate(paths[1:], 1):
        if not is_named(path):
            raise YarnEdgeError(f"{path}: is missing; {first.path.name} is the first of {count} shards in one folder")
        shard = read(path)
        _check_shard(shard, index, count)
        for name, tensor in shard.tensors.items():
            if name in tensors:
                raise YarnEdgeError(
                    f"{path}: tensor {one_line(name, 100)} appears twice, also in {tensors[name].path.name}"
                )
            tensors[name] = tensor
    total = split_number(first, TENSORS_COUNT)
    if total != len(tensors):
        claimed = f"is {total}" if total is not None else "is missing"
        raise YarnEdgeError(
            f"{first.path}: {TENSORS_COUNT} {claimed}, the {count} shards have {len(tensors)} tensors: "
            "one of them belongs to another model or is incomplete"
        )
    return replace(first, shards=paths, tensors=tensors)


def _stem_of_first(first: GGUFFile, count: int) -> str:
    """The part of the name that all shards share. Raises YarnEdgeError for a later shard, or for another form of name."""
    index = split_number(first, NO)
    parsed = parse_shard_name(first.path.name)
    stem = parsed[0] if parsed else first.path.stem
    wanted = shard_name(stem, 0, count)
    if index is None:
        raise YarnEdgeError(f"{first.path}: {NO} is missing, but {COUNT} is {count}")
    if index:
        raise YarnEdgeError(f"{first.path}: is shard {index + 1} of {count}; give the first one, {wanted}")
    if parsed != (stem, 0, count) or not stem:
        raise YarnEdgeError(
            f"{first.path}: is the first of {count} shards, which are found by name: "
            f"it must be called {wanted if stem else shard_name('NAME', 0, count)}"
        )
    return stem


def _check_shard(shard: GGUFFile, index: int, count: int) -> None:
    number, claimed = split_number(shard, NO), split_number(shard, COUNT)
    if number != index:
        value = "is missing" if number is None else f"is {number}"
        raise YarnEdgeError(f"{shard.path}: {NO} {value}, the name says {index}: it is a shard of something else")
    if claimed not in (None, count):
        raise YarnEdgeError(
            f"{shard.path}: {COUNT} is {claimed}, the first shard says {count}: it belongs to another model"
        )
