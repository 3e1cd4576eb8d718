"""compressed-tensors (llm-compressor's files): FP8 and integers of 8 bits with scales beside them, and integers packed into int32.

Definition: compressed_tensors, quantization/lifecycle/forward_helpers.py: _dequantize, (weight - zero point) * scale in the type
of the scale; compressors/pack_quantized. g_idx: versions before 0.15, where forward.py orders the columns by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, shown

from .arithmetic import Floats, by_byte, dequantized_tensor, e4m3_values, rounded, unpacked
from .grid import Grid, scale
from .groups import group_of_columns
from .pieces import Pieces, matches

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_SCALES = ("F32", "BF16", "F16")
_STORED = {"int": "I8", "float": "F8_E4M3"}


@dataclass(frozen=True)
class Scheme:
    """A config group: how the weights of its targets are quantized. block: rows and columns of a block, 0 for all of them."""

    targets: tuple[str, ...]
    format: str
    bits: int
    kind: str
    symmetric: bool
    block: tuple[int, int]

    def __str__(self) -> str:
        what = "FP8" if self.kind == "float" else f"{self.bits}-bit integers"
        height, width = self.block
        each = {(0, 0): "a scale for each matrix", (1, 0): "a scale for each row"}.get(self.block)
        return f"{what}, {each or (f'groups of {width}' if height == 1 else f'blocks of {height} x {width}')}"


def read_compressed(pieces: Pieces) -> str:
    """Take all weights of compressed-tensors. Returns what they are."""
    refuse_transformed(pieces)
    schemes = config_groups(pieces.config)
    used: dict[str, None] = {}
    for module, name in pieces.ending(".weight_packed", ".weight"):
        if name.endswith("_packed") or f"{module}.weight_scale" in pieces.left:
            scheme = _scheme_of(pieces, schemes, module)
            used[str(scheme)] = None
            (_take_packed if name.endswith("_packed") else _take_plain)(pieces, scheme, module)
    return f"compressed-tensors ({'; '.join(used)})"


def refuse_transformed(pieces: Pieces) -> None:
    """Raise YarnEdgeError for weights that are sparse, or that the model multiplies with a rotation while it runs."""
    sparsity = pieces.config.section("sparsity_config")
    if sparsity is not None and sparsity.values.get("format") not in (None, "dense"):
        raise sparsity.error("format", f"is {shown(sparsity.values.get('format'))}, which is not read: {_ORIGINAL}")
    transforms = pieces.config.section("transform_config")
    if transforms is not None and transforms.values.get("config_groups"):
        raise transforms.error("config_groups", f"rotates weights and activations, which a GGUF cannot: {_ORIGINAL}")


_ORIGINAL = "take the original checkpoint"


def config_groups(config: ConfigFile) -> tuple[Scheme, ...]:
    """The config groups. Raises YarnEdgeError for one that cannot be dequantized here."""
    groups = config.section("config_groups")
    if groups is None or not groups.values:
        raise config.error("config_groups", "is missing: add it, as the quantizing library wrote it")
    return tuple(_scheme(config, group) for name in groups.values if (group := groups.section(name)) is not None)


def _scheme(config: ConfigFile, group: ConfigFile) -> Scheme:
    weights = group.section("weights")
    if weights is None:
        raise group.error("weights", "is missing: only weights that are quantized can be dequantized")
    form = group.values.get("format") or config.values.get("format")
    if form not in _FORMATS:
        where = group if group.values.get("format") else config
        raise where.error("format", f"is {shown(form)}, which is not read (known: {', '.join(_FORMATS)}): {_ORIGINAL}")
    targets = group.values.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise group.error("targets", f"is {shown(targets)}, expected a list of names")
    kind, bits = weights.values.get("type", "int"), weights.required_integer("num_bits")
    packed = form == "pack-quantized"
    if (
        not isinstance(kind, str)
        or kind not in _STORED
        or bits > 8
        or (bits != 8 and not packed)
        or (kind == "float" and packed)
    ):
        raise weights.error("num_bits", f"is {bits} of type {shown(kind)}, which {form} cannot hold: correct it")
    symmetric = weights.boolean("symmetric") is not False
    return Scheme(tuple(targets), form, bits, kind, symmetric, _block(weights))


def _block(weights: ConfigFile) -> tuple[int, int]:
    group, strategy = weights.values.get("group_size"), weights.values.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    if strategy in ("tensor", "channel"):
        return (0, 0) if strategy == "tensor" else (1, 0)
    if strategy == "group":
        return 1, weights.required_integer("group_size")
    block = weights.values.get("block_structure")
    if (
        strategy == "block"
        and isinstance(block, list)
        and len(block) == 2
        and all(is_whole(n) and n > 0 for n in block)
    ):
        return int(block[0]), int(block[1])
    what = f"is {shown(strategy)} with the block_structure {shown(block)}, which is not read: {_ORIGINAL}"
    raise weights.error("strategy", what)


def _scheme_of(pieces: Pieces, schemes: tuple[Scheme, ...], module: str) -> Scheme:
    """The group of a module: one that names it, else one that its name matches, else one for its class."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target == module,
        lambda target: target.startswith("re:") and matches(target[3:], module),
        lambda target: target == "Linear",
    )
    for test in tests:
        for scheme in schemes:
            if any(map(test, scheme.targets)):
                return scheme
    groups = pieces.config.prefix + "config_groups"
    raise pieces.error(f"{module}.weight", f"is quantized, but no targets of {groups} are for it: correct them")


def _grid(pieces: Pieces, scheme: Scheme, module: str, shape: tuple[int, ...]) -> tuple[Grid, int]:
    """(the scales, the width of a block)."""
    (rows, columns), (height, width) = shape, scheme.block
    height, width = height or rows, width or columns
    down, across = -(-rows // height), -(-columns // width)
    name = f"{module}.weight_scale"
    scales = pieces.take(name, _SCALES, of=f"{module}.weight")
    if scales.shape not in ((down, across), *(((down * across,), ()) if across == 1 or down * across == 1 else ())):
        raise pieces.error(name, f"has the shape {list(scales.shape)}, expected {[down, across]} ({scheme})")
    if scales.shape == () and down * across != 1:
        raise pieces.error(name, f"is one number, expected {[down, across]} ({scheme})")
    return Grid(scales, rows, height, across), width


def _take_plain(pieces: Pieces, scheme: Scheme, module: str) -> None:
    """A weight of one byte for each value."""
    name = f"{module}.weight"
    pieces.matrix(name)
    weight = pieces.take(name, (_STORED[scheme.kind],))
    grid, width = _grid(pieces, scheme, module, weight.shape)
    zeros = None
    if f"{name}_zero_point" in pieces.left:
        zero = pieces.take(f"{name}_zero_point", ("I8", "F8_E4M3"), grid.values.shape)
        zeros = Grid(zero, grid.rows, grid.height, grid.across)
    elif not scheme.symmetric:
        raise pieces.error(f"{name}_zero_point", f"is missing: {name} cannot be dequantized without it")
    dtype = grid.values.dtype

    def rows(start: int, stop: int) -> Floats:
        codes = weight.rows(start, stop)
        values = codes.astype(np.float32) if scheme.kind == "int" else by_byte(e4m3_values(), codes)
        subtracted = None if zeros is None else zeros.of_rows(start, stop)
        return rounded(scale(values, grid.of_rows(start, stop), width, subtracted), dtype)

    pieces.put(name, name, dequantized_tensor(name, weight.shape, rows))


def _take_packed(pieces: Pieces, scheme: Scheme, module: str) -> None:
    """A weight whose integers lie in int32, one after another, each row from a new one on."""
    name, at, bits = f"{module}.weight", f"{module}.weight_packed", scheme.bits
    if scheme.format != "pack-quantized":
        raise pieces.error(at, f"is packed, but its format is {scheme.format}: correct it")
    packed = pieces.take(at, ("I32",))
    saved = pieces.take(f"{module}.weight_shape", ("I64", "I32"), (2,), of=name)
    n_rows, columns = (int(n) for n in saved.whole())
    if packed.shape != (n_rows, -(-columns * bits // 32)) or n_rows <= 0 or columns <= 0:
        raise pieces.error(
            at, f"has the shape {list(packed.shape)}, which is not that of {[n_rows, columns]} in {bits} bits"
        )
    grid, width = _grid(pieces, scheme, module, (n_rows, columns))
    order = f"{module}.weight_g_idx"
    index = pieces.take(order, ("I32", "I64"), (columns,)) if order in pieces.left else None
    groups = group_of_columns(pieces, index, grid.across, width)
    zeros = _zeros(pieces, scheme, module, grid)
    dtype = grid.values.dtype

    def rows(start: int, stop: int) -> Floats:
        values = unpacked(packed.rows(start, stop).view("<u4"), bits, columns)
        return rounded(scale(values, grid.of_rows(start, stop), width, zeros(start, stop), groups()), dtype)

    pieces.put(name, at, dequantized_tensor(name, (n_rows, columns), rows))


def _zeros(pieces: Pieces, scheme: Scheme, module: str, grid: Grid) -> Callable[[int, int], Floats]:
    """The zero points of rows, as unsigned as the packed integers."""
    middle, bits = np.float32(1 << (scheme.bits - 1)), scheme.bits
    name = f"{module}.weight_zero_point"
    if scheme.symmetric and name not in pieces.left:
        return lambda start, stop: np.full((stop - start, 1), middle)
    if scheme.symmetric or grid.height != 1:  # saved as they are
        zero = pieces.take(name, ("I8", "I32"), grid.values.shape, of=f"{module}.weight")
        plain = Grid(zero, grid.rows, grid.height, grid.across)
        return lambda start, stop: plain.of_rows(start, stop) + middle
    down = -(-grid.rows * bits // 32)
    packed = pieces.take(name, ("I32",), (down, grid.across), of=f"{module}.weight")

    def rows(start: int, stop: int) -> Floats:
        first = start // 32 * 32  # there a word begins
        words = packed.rows(first * bits // 32, min(down, -(-stop * bits // 32))).view("<u4")
        columns = unpacked(np.ascontiguousarray(words.T), bits, stop - first)
        return np.ascontiguousarray(columns[:, start - first :].T)

    return rows


def listed_apart(config: ConfigFile, module: str) -> bool:
    """Whether quantization_config says that a module is not quantized: it is ignored, or no group is for it."""
    ignored = config.values.get("ignore")
    patterns = [p for p in ignored if isinstance(p, str)] if isinstance(ignored, list) else []
    if any(_named(pattern, module) for pattern in patterns):
        return True
    targets = list(_targets(config.values.get("config_groups")))
    return "Linear" not in targets and not any(_named(target, module) for target in targets)


def _targets(groups: Any) -> Iterator[str]:
    for group in groups.values() if isinstance(groups, dict) else ():
        found = group.get("targets") if isinstance(group, dict) else None
        yield from (t for t in found if isinstance(t, str)) if isinstance(found, list) else ()


def _named(pattern: str, module: str) -> bool:
    return matches(pattern[3:], module) if pattern.startswith("re:") else pattern == module
