"""Editing a model that may be split over several GGUFs: what the new files are called, and that all of them appear or none.

The header is edited in the first shard, where llama.cpp reads it. The other shards are copied whole, unless one of their
tensors is set or split.tensors.count changes. New shards are written under their final names into a folder beside the output,
so that they can be loaded and checked before anyone sees them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.gguf.edit import Edit, Vector, check_edit, open_source, write_edited
from yarn_edge.gguf.fast_copy import copy_range
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_shard
from yarn_edge.gguf.split import TENSORS_COUNT, parse_shard_name, shard_name
from yarn_edge.signals import deferred_ctrl_c
from yarn_edge.source_file import changed
from yarn_edge.writer import (
    beside,
    check_output,
    flush_file,
    one_at_a_time,
    open_output,
    partial_file,
    partial_folder,
    publish,
)


def output_files(source: GGUFFile, output: Path, force: bool) -> list[Path]:
    """The files to write, one for each shard of `source`, checked with `writer.check_output`.

    For a split source, `output` is NAME-00001-of-0000N.gguf, or NAME.gguf for short. Raises YarnEdgeError for other names.
    """
    count = len(source.shards)
    if count < 2:
        return [check_output(output, force, source.shards)]
    parsed = parse_shard_name(output.name)
    stem = parsed[0] if parsed else output.name.removesuffix(".gguf")
    fits = parsed[1:] == (0, count) if parsed else output.suffix == ".gguf"
    if not fits or not stem:
        raise YarnEdgeError(
            f"{output}: {source.path.name} has {count} shards: give NAME.gguf or {shard_name('NAME', 0, count)}"
        )
    outputs = [output.with_name(shard_name(stem, i, count)) for i in range(count)]
    for path in outputs:
        if check_output(path, force, source.shards).name != path.name:
            raise YarnEdgeError(f"{path}: is a link to another name, but shards are found by their names: remove it")
    return outputs


def shards_bytes(source: GGUFFile) -> int:
    """Bytes of all shards: about what the new files need, and the total that `advance` counts up to."""
    return sum(path.stat().st_size for path in source.shards)


@contextmanager
def partial_files(outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write, removed on leaving unless they were published. Several files keep the names of `outputs`, in a folder."""
    if len(outputs) == 1:
        with partial_file(outputs[0]) as partial:
            yield [partial]
        return
    with partial_folder(outputs[0]) as folder:
        yield [folder / path.name for path in outputs]


def edit_gguf_files(
    source: GGUFFile,
    partials: Sequence[Path],
    *,
    set_keys: Mapping[str, Any],
    remove_keys: Collection[str] = (),
    set_tensors: Mapping[str, Vector] | None = None,
    advance: Callable[[float], None] = lambda _bytes: None,
    flush: bool = True,
) -> list[str]:
    """Write `source`, a model of one or more files, to new files with its header edited; with `flush` they are on the disk.

    partials: a path for each shard. set_keys: values by key; int becomes uint32, float float32 (float64 under yarn_edge.),
    bool, str, lists by their first item. set_tensors: float32 vectors; one that exists must be F32 of that length, a new one
    becomes the last tensor of the first shard. Bytes after the last tensor stay, unless a tensor is added. Returns one sentence
    for each change, such as "llama.rope.scaling.attn_factor: absent -> 1.1857". Raises YarnEdgeError if the source changed
    since it was read, or is laid out so that llama.cpp cannot load it; OSError on a full disk. The caller removes the files on
    errors, and publishes them.
    """
    if len(partials) != len(source.shards):
        raise ValueError(f"{source.path}: has {len(source.shards)} shards, not {len(partials)}")
    tensors = dict(set_tensors or {})
    check_edit(source, Edit(set_keys, remove_keys, tensors, {}))
    added = sum(name not in source.tensors for name in tensors)
    changes: list[str] = []
    for index, (path, partial) in enumerate(zip(source.shards, partials, strict=True)):
        shard = source if len(partials) == 1 else read_shard(path, vocabulary=False)
        if shard.tensors != {n: t for n, t in source.tensors.items() if t.path == path} or (
            index == 0 and (shard.file_bytes, shard.mtime_ns) != (source.file_bytes, source.mtime_ns)
        ):
            raise changed(path)
        own = {n: v for n, v in tensors.items() if n in shard.tensors or (not index and n not in source.tensors)}
        raw_keys = _tensor_count(shard, len(source.tensors) + added) if len(partials) > 1 and added else {}
        if index and not own and not raw_keys:
            _copy(shard, partial, advance, flush)
            continue
        edit = Edit({} if index else set_keys, () if index else remove_keys, own, raw_keys, flush)
        changes += write_edited(shard, partial, edit, advance)
    return changes


def _tensor_count(shard: GGUFFile, total: int) -> dict[str, bytes]:
    """The new split.tensors.count, if the shard has one: an int32, as llama.cpp requires."""
    if TENSORS_COUNT not in shard.entries:
        return {}
    key = TENSORS_COUNT.encode()
    return {TENSORS_COUNT: struct.pack("<Q", len(key)) + key + struct.pack("<Ii", 5, total)}


def _copy(shard: GGUFFile, partial: Path, advance: Callable[[float], None], flush: bool) -> None:
    """Copy the whole file."""
    with open_source(shard) as file, open_output(partial) as target:
        copy_range(file.raw, target, 0, 0, shard.file_bytes, advance, flush)
        file.check_unchanged()
        if flush:
            os.fsync(target.fileno())


def publish_files(partials: Sequence[Path], outputs: Sequence[Path], force: bool, flush: bool = True) -> None:
    """Give finished files their names: all of them, or none if one cannot have its own.

    A model is loaded by its first shard, which is therefore the last to appear and, with `force`, the first to be set aside:
    nobody loads shards of two models. Nor does a second run publish its files among these. On an error the old files come back.
    """
    try:
        for partial in partials if flush else ():  # before any name changes, because it can take long
            flush_file(partial)
        with ExitStack() as stack:
            for folder in sorted({output.parent for output in outputs}) if len(outputs) > 1 else ():
                stack.enter_context(one_at_a_time(folder))
            stack.enter_context(deferred_ctrl_c())
            _rename_all(partials, outputs, force, flush)
    except OSError as error:
        raise os_error(error) from error


def _rename_all(partials: Sequence[Path], outputs: Sequence[Path], force: bool, flush: bool) -> None:
    new = [partial.stat() for partial in partials]
    kept: dict[Path, Path] = {}
    try:
        for output in outputs if len(outputs) > 1 and force else ():
            if output.exists():
                kept[output] = beside(output, ".replaced")
                output.rename(kept[output])
        for partial, output in reversed(list(zip(partials, outputs, strict=True))):
            publish(partial, output, force, flush)
    except BaseException:
        for state, output in zip(new, outputs, strict=True):
            if output.exists() and os.path.samestat(state, output.stat()):
                output.unlink()
        for output, aside in kept.items():
            if aside.exists():
                aside.rename(output)
        raise
    for aside in kept.values():
        aside.unlink(missing_ok=True)
