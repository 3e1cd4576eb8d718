"""GPTQ (2, 3, 4 and 8 bits) and AWQ (4 bits, GEMM layout): integers packed into int32, (inputs, outputs), with groups of inputs.

Definition: GPTQModel, nn_modules/qlinear/__init__.py: dequantize_weight; AutoAWQ, utils/packing_utils.py: dequantize_gemm;
(weight - zero point) * scale in the type of the scale. Zero points of format gptq are saved less 1, those of gptq_v2 as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, shown

from ..stored import Tensor
from .arithmetic import Floats, as_float32, dequantized_tensor, rounded, unpacked
from .grid import scale
from .groups import group_of_columns
from .panels import PANEL_BYTES, Panel, PanelCache, Words, turned_words
from .pieces import Pieces, matches

_SCALES = ("F16", "BF16", "F32")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each 4 bits of a word, from the lowest
_WORD = 32


@dataclass(frozen=True)
class Packing:
    """How integers lie in the words of a file. bits: of one. less: what is added to saved zero points. title: for messages.

    down: packed along the inputs (GPTQ), else along the outputs (AWQ).
    """

    title: str
    bits: int
    less: int
    down: bool

    @property
    def outputs_per_step(self) -> int:
        """Outputs that must be read together."""
        return 1 if self.down else _WORD // self.bits

    def outputs(self, words: Words, n_inputs: int) -> Floats:
        """Integers of turned words: (outputs, n_inputs)."""
        return unpacked(words, self.bits, n_inputs) if self.down else _in_awq_order(words)

    def zeros(self, words: Words, n_outputs: int) -> Floats:
        """Integers of words that are packed along the outputs: (rows, n_outputs)."""
        if self.down:
            return unpacked(words, self.bits, n_outputs)
        return np.ascontiguousarray(_in_awq_order(np.ascontiguousarray(words.T)).T)


def _in_awq_order(words: Words) -> Floats:
    """(n, m) words as (8 n, m) integers."""
    out = np.empty((len(words), len(_AWQ_ORDER), words.shape[1]), np.float32)
    for place, output in enumerate(_AWQ_ORDER):
        out[:, output] = (words >> np.uint32(4 * place)) & np.uint32(15)
    return out.reshape(-1, words.shape[1])


def read_gptq(pieces: Pieces) -> str:
    """Take all weights of GPTQ. Returns what they are."""
    form = pieces.config.values.get("checkpoint_format") or pieces.config.values.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        key = "checkpoint_format" if pieces.config.values.get("checkpoint_format") else "format"
        raise pieces.config.error(key, f"is {shown(form)}, which is not read (known: gptq, gptq_v2): {_ORIGINAL}")
    bits = pieces.choice("bits", (2, 3, 4, 8))
    _refuse_other_bits(pieces.config)
    packing = Packing("GPTQ", bits, int(form == "gptq"), True)
    return _read(pieces, packing)


def read_awq(pieces: Pieces) -> str:
    """Take all weights of AWQ. Returns what they are."""
    key = "version" if pieces.config.values.get("version") else "format"
    form = pieces.config.values.get(key)
    if form is not None and str(form).lower() != "gemm":
        raise pieces.config.error(key, f"is {shown(form)}, which is not read (known: gemm): {_ORIGINAL}")
    pieces.choice("backend", (None, "auto", "autoawq", "gemm"))
    pieces.choice("bits", (None, 4))
    return _read(pieces, Packing("AWQ", 4, 0, False))


_ORIGINAL = "take the original checkpoint"


def _refuse_other_bits(config: ConfigFile) -> None:
    """`dynamic` may give some modules other bits; those that it leaves out ("-:") are floats."""
    dynamic = config.values.get("dynamic")
    others = [rule for rule in dynamic if not rule.startswith("-:")] if isinstance(dynamic, dict) else []
    if others:
        raise config.error("dynamic", f"quantizes {shown(others[0])} in another way, which is not read: {_ORIGINAL}")


def _read(pieces: Pieces, packing: Packing) -> str:
    cache = PanelCache()
    size = pieces.config.values.get("group_size", pieces.config.values.get("q_group_size", 128))
    if not is_whole(size) or not (size == -1 or size > 0):
        raise pieces.config.error("group_size", f"is {shown(size)}, expected -1 or a whole number above 0")
    for module, name in pieces.ending(".qweight"):
        pieces.put(f"{module}.weight", name, _take(pieces, packing, module, int(size), cache))
    groups = "a scale for each row" if size == -1 else f"groups of {int(size)}"
    return f"{packing.title} ({packing.bits} bits, {groups})"


def _take(pieces: Pieces, packing: Packing, module: str, size: int, cache: PanelCache) -> Tensor:
    """One weight. Its file's shape tells the number of inputs and outputs."""
    name, bits = f"{module}.qweight", packing.bits
    pieces.matrix(name)
    packed = pieces.take(name, ("I32",))
    n_inputs, n_outputs = packed.shape
    n_inputs, n_outputs = (
        (n_inputs * _WORD // bits, n_outputs) if packing.down else (n_inputs, n_outputs * _WORD // bits)
    )
    width = n_inputs if size == -1 else size
    n_groups = -(-n_inputs // width)
    scales = pieces.take(f"{module}.scales", _SCALES, (n_groups, n_outputs), of=name)
    zeros = pieces.take(f"{module}.qzeros", ("I32",), (n_groups, -(-n_outputs * bits // _WORD)), of=name)
    order = f"{module}.g_idx"
    index = pieces.take(order, ("I32", "I64"), (n_inputs,)) if order in pieces.left else None
    groups = group_of_columns(pieces, index, n_groups, width)
    step = packing.outputs_per_step
    per_panel = max(_WORD, PANEL_BYTES // (4 * packed.shape[0]) * step // _WORD * _WORD)

    def panel(number: int) -> Panel:
        first, stop = number * per_panel, min(n_outputs, (number + 1) * per_panel)
        words = turned_words(packed, first // step, stop // step)
        all_zeros = packing.zeros(zeros.bits().view("<u4"), n_outputs)[:, first:stop]
        if packing.less and bool((all_zeros == (1 << bits) - 1).any()):
            raise pieces.error(zeros.name, f"has zero points of -1, which programs read differently: {_ORIGINAL}")
        of_outputs = np.ascontiguousarray(as_float32(scales.bits()[:, first:stop].T, scales.dtype))
        return Panel(words, of_outputs, np.ascontiguousarray(all_zeros.T) + np.float32(packing.less))

    def part(number: int, start: int, stop: int) -> Floats:
        found = cache.get(name, number, lambda: panel(number))
        first, last = start // step, -(-stop // step)
        values = packing.outputs(found.words[first:last], n_inputs)[start - first * step :][: stop - start]
        return rounded(scale(values, found.scales[start:stop], width, found.zeros[start:stop], groups()), scales.dtype)

    return dequantized_tensor(f"{module}.weight", (n_outputs, n_inputs), _in_panels(part, per_panel))


def _in_panels(
    part: Callable[[int, int, int], Floats], per_panel: int
) -> Callable[[int, int], npt.NDArray[np.float32]]:
    """Rows [start, stop), of which part(panel, first, last) gives those inside one panel."""

    def rows(start: int, stop: int) -> Floats:
        parts = []
        while start < stop:
            number, inside = divmod(start, per_panel)
            n = min(stop - start, per_panel - inside)
            parts.append(part(number, inside, inside + n))
            start += n
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    return rows


def left_out_by_dynamic(config: ConfigFile, module: str) -> bool:
    """Whether `dynamic` of a GPTQ config says that a module is not quantized."""
    dynamic = config.values.get("dynamic")
    rules = dynamic if isinstance(dynamic, dict) else {}
    return any(rule.startswith("-:") and matches(rule[2:], module) for rule in rules)
