"""MXFP4 as transformers saves it (integrations/mxfp4.py), read as ggml's MXFP4: the same bits in another order.

A tensor NAME is two of bytes: NAME_blocks (..., groups, 16) has the codes of 32 weights in a group, 2j in the low half of byte j
and 2j + 1 in the high half; NAME_scales (..., groups) has an exponent for each group. ggml's block_mxfp4 (ggml-common.h) is the exponent,
then 16 bytes with code j in the low half of byte j and j + 16 in the high half. Codes and exponents mean the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError, one_line

Bytes = npt.NDArray[np.uint8]
PACKED = "MXFP4"
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32  # weights
_CODES = GROUP // 2  # bytes
BLOCK_BYTES = 1 + _CODES


class SavedBytes(Protocol):
    """A tensor in the file, as `checkpoint.Tensor`."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def read(self) -> Callable[[int, Any], None]: ...


@dataclass(frozen=True)
class PackedTensor:
    """Two tensors of a checkpoint as one in ggml's MXFP4.

    exponents: the name of that tensor. shape: in weights. read(offset, buffer): whole blocks from byte `offset` on.
    """

    exponents: str
    shape: tuple[int, ...]
    read: Callable[[int, Bytes], None]


def ggml_blocks(codes: Bytes, exponents: Bytes) -> Bytes:
    """Groups of transformers, codes (n, 16) and exponents (n,), as blocks of ggml, (n, 17)."""
    out = np.empty((len(codes), BLOCK_BYTES), np.uint8)
    first, second = codes[:, : _CODES // 2], codes[:, _CODES // 2 :]  # weights 0 to 15 and 16 to 31
    out[:, 0] = exponents
    out[:, 1::2] = (first & 0x0F) | (second << 4)
    out[:, 2::2] = (first >> 4) | (second & 0xF0)
    return out


def packed_tensors(source: str, tensors: Mapping[str, SavedBytes]) -> dict[str, PackedTensor]:
    """Every pair of codes and exponents, by the name of the codes. source: the checkpoint, for messages.

    Raises YarnEdgeError for one without the other, and for shapes that are not those of a pair.
    """
    found: dict[str, PackedTensor] = {}
    for name, saved in tensors.items():
        base = name.removesuffix(BLOCKS) if name.endswith(BLOCKS) else name.removesuffix(SCALES)
        if base == name or saved.dtype != "U8":
            continue
        for other in (base + BLOCKS, base + SCALES):
            if other not in tensors or tensors[other].dtype != "U8":
                raise YarnEdgeError(
                    f"{source}: tensor {one_line(name, 100)} is one half of MXFP4 weights, and {one_line(other, 100)} is "
                    f"{'missing' if other not in tensors else 'not U8'}: download the checkpoint again"
                )
        found[base + BLOCKS] = _packed(source, base, tensors[base + BLOCKS], tensors[base + SCALES])
    return found


def _packed(source: str, base: str, codes: SavedBytes, exponents: SavedBytes) -> PackedTensor:
    outer = codes.shape[:-2]
    groups = codes.shape[-2] if len(codes.shape) > 1 else 0
    if codes.shape[-1:] != (_CODES,) or exponents.shape != (*outer, groups):
        raise YarnEdgeError(
            f"{source}: {one_line(base + BLOCKS, 100)} has the shape {list(codes.shape)} and {one_line(base + SCALES, 100)} "
            f"{list(exponents.shape)}: MXFP4 has [..., groups, {_CODES}] and [..., groups]"
        )

    def read(offset: int, buffer: Bytes) -> None:
        first, n = offset // BLOCK_BYTES, len(buffer) // BLOCK_BYTES
        raw, scales = np.empty((n, _CODES), np.uint8), np.empty(n, np.uint8)
        codes.read(first * _CODES, raw.reshape(-1))
        exponents.read(first, scales)
        buffer.reshape(n, BLOCK_BYTES)[:] = ggml_blocks(raw, scales)

    return PackedTensor(base + SCALES, (*outer, groups * GROUP), read)
