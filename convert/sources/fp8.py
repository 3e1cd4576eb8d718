"""FP8 as DeepSeek, Qwen and Mistral publish it (quant_method fp8): float8_e4m3fn with a scale for a matrix, or for each 128 x 128.

Definition: weight * scale in float32 (DeepSeek-V3, inference/kernel.py: weight_dequant_kernel; transformers,
integrations/finegrained_fp8.py: Fp8Dequantize, which wants whole blocks). Both round the product to the type that they were asked
for; here it stays float32.
"""

from __future__ import annotations

import math

from yarn_edge.checkpoint.config_file import is_whole, shown

from .arithmetic import by_byte, dequantized_tensor, e4m3_values
from .grid import Grid, scale
from .pieces import Pieces

_SCALES = ("F32", "BF16", "F16", "F8_E8M0")
_DEFAULT_BLOCK = (128, 128)  # of transformers' FineGrainedFP8Config


def read_fp8(pieces: Pieces) -> str:
    """Take all FP8 weights and their scales. Returns what they are."""
    pieces.choice("fmt", (None, "e4m3", "float8_e4m3fn"))
    pieces.choice("expert_dtype", (None, "fp8"))
    exponents = pieces.choice("scale_fmt", (None, "float", "ue8m0")) == "ue8m0"
    kinds = dict.fromkeys(
        _take(pieces, name, exponents) for name, tensor in list(pieces.left.items()) if tensor.dtype == "F8_E4M3"
    )
    return f"FP8 ({', '.join(kinds)})"


def _take(pieces: Pieces, name: str, exponents: bool) -> str:
    """Make one weight. Returns what its scales are for."""
    weight = pieces.matrix(name, stacked=True)
    found = next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in pieces.left), f"{name}_scale_inv")
    del pieces.left[name]
    scales = pieces.take(found, (*_SCALES, "U8") if exponents else _SCALES, of=name)
    *stack, rows, columns = weight.shape
    height, width = rows, columns
    if math.prod(scales.shape) != math.prod(stack):
        height, width = _block(pieces)
    across = -(-columns // width)
    expected = (*stack, -(-rows // height), across)
    if math.prod(scales.shape) != math.prod(expected) or (height < rows and scales.shape != expected):
        raise pieces.error(found, f"has the shape {list(scales.shape)}, expected {list(expected)}")
    grid = Grid(scales, rows, height, across)
    pieces.put(
        name,
        name,
        dequantized_tensor(
            name,
            weight.shape,
            lambda start, stop: scale(
                by_byte(e4m3_values(), weight.rows(start, stop)), grid.of_rows(start, stop), width
            ),
        ),
    )
    return "a scale for each matrix" if (height, width) == (rows, columns) else f"blocks of {height} x {width}"


def _block(pieces: Pieces) -> tuple[int, int]:
    """(rows, columns) of a block by quantization_config."""
    block = pieces.config.values.get("weight_block_size", _DEFAULT_BLOCK)
    if not isinstance(block, (list, tuple)) or len(block) != 2 or not all(is_whole(n) and n > 0 for n in block):
        raise pieces.config.error("weight_block_size", f"is {shown(block)}, expected two whole numbers above 0")
    return int(block[0]), int(block[1])
