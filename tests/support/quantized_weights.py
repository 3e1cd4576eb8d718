"""Quantized weights of every kind that convert reads, made of random codes, and their floats by a plain reading of the definitions.

`python -m support.quantized_weights` (in tests/, where compressed-tensors, bitsandbytes and transformers are installed) dequantizes the
same weights with these libraries, and writes the digests of what they say to tests/convert/sources/libraries.json.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

RECORDED = Path(__file__).parent.parent / "convert" / "sources" / "libraries.json"
GROUP, BLOCK = 32, (40, 24)
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Pieces = dict[str, torch.Tensor]
Rng = np.random.Generator


@dataclass(frozen=True)
class Kind:
    """config: quantization_config. make: for a shape, the tensors by what follows the module's name, and the floats."""

    config: dict[str, Any]
    make: Callable[[tuple[int, int], Rng], tuple[Pieces, torch.Tensor]]


def rng_of(name: str) -> Rng:
    return np.random.default_rng(zlib.crc32(name.encode()))


def scales(rng: Rng, *shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 0.01) -> torch.Tensor:
    return torch.from_numpy(np.asarray(size * (0.5 + rng.random(shape)), np.float32)).to(dtype)


def integers(rng: Rng, bits: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 1 << bits, shape))


def eight_bit_floats(rng: Rng, shape: tuple[int, int]) -> torch.Tensor:
    """Every finite code of float8_e4m3fn, and more of them at random."""
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes.reshape(-1)[:256] = np.arange(256)
    codes[codes & 127 == 127] = 0
    return torch.from_numpy(codes).view(torch.float8_e4m3fn)


def blocks(values: torch.Tensor, height: int, width: int, shape: tuple[int, int]) -> torch.Tensor:
    """A value for each block, as a value for each weight."""
    return values.repeat_interleave(height, 0).repeat_interleave(width, 1)[: shape[0], : shape[1]]


def packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Rows of integers as rows of int32, bit after bit."""
    ones = ((values.numpy()[:, :, None] >> np.arange(bits)) & 1).reshape(len(values), -1).astype(np.uint8)
    ones = np.pad(ones, ((0, 0), (0, -ones.shape[1] % 32)))
    return torch.from_numpy(np.packbits(ones, axis=1, bitorder="little").view(np.int32).copy())


def fp8(scale_shape: Callable[[int, int], tuple[int, ...]], dtype: torch.dtype, name: str) -> Any:
    def make(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
        weight, scale = eight_bit_floats(rng, shape), scales(rng, *scale_shape(*shape), dtype=dtype, size=0.001)
        each = blocks(scale, *BLOCK, shape) if scale.ndim == 2 and scale.shape[1] > 1 else scale
        if name == "weight_scale_inv":  # the product in float32
            return {"weight": weight, name: scale}, weight.float() * each.float()
        return {"weight": weight, name: scale}, weight.to(dtype) * each

    return make


def exponents(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
    """Scales that are powers of two, one byte each."""
    weight = eight_bit_floats(rng, shape)
    scale = torch.from_numpy(rng.integers(110, 122, grid(*shape), dtype=np.uint8)).view(torch.float8_e8m0fnu)
    return {"weight": weight, "weight_scale_inv": scale}, weight.float() * blocks(scale.float(), *BLOCK, shape)


def grid(rows: int, columns: int) -> tuple[int, int]:
    return -(-rows // BLOCK[0]), -(-columns // BLOCK[1])


def int8(asymmetric: bool) -> Any:
    def make(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
        weight, scale = integers(rng, 8, *shape).sub(128).to(torch.int8), scales(rng, shape[0], 1, size=0.0005)
        pieces, floats = {"weight": weight, "weight_scale": scale}, weight.to(scale.dtype)
        if asymmetric:
            pieces["weight_zero_point"] = integers(rng, 7, shape[0], 1).sub(64).to(torch.int8)
            floats = floats - pieces["weight_zero_point"].to(scale.dtype)
        return pieces, floats * scale

    return make


def pack_quantized(bits: int, asymmetric: bool = False, by_index: bool = False) -> Any:
    def make(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
        codes, n_groups = integers(rng, bits, *shape), shape[1] // GROUP
        scale, zero = scales(rng, shape[0], n_groups), integers(rng, bits, shape[0], n_groups)
        group = torch.arange(shape[1]) // GROUP
        pieces = {"weight_packed": packed(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor(shape)}
        if by_index:
            group = torch.from_numpy(rng.permutation(group.numpy()))
            pieces["weight_g_idx"] = group.to(torch.int32)
        if asymmetric:
            pieces["weight_zero_point"] = packed(zero.T, bits).T.contiguous()
        middle = zero[:, group] if asymmetric else 1 << (bits - 1)
        return pieces, (codes - middle).to(scale.dtype) * scale[:, group]

    return make


def gptq(bits: int, less: int, by_index: bool = False, dtype: torch.dtype = torch.float16) -> Any:
    def make(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
        n_out, n_in = shape
        codes, group = integers(rng, bits, n_in, n_out), torch.arange(n_in) // GROUP
        zero = integers(rng, bits, n_in // GROUP, n_out).clamp(min=1)
        scale = scales(rng, n_in // GROUP, n_out, dtype=dtype)
        scale[0] = 1e-6  # half precision has few of such numbers
        if by_index:
            group = torch.from_numpy(rng.permutation(group.numpy()))
        pieces = {
            "qweight": packed(codes.T, bits).T.contiguous(),
            "qzeros": packed(zero - less, bits),
            "scales": scale,
            "g_idx": group.to(torch.int32),
        }
        return pieces, (scale[group] * (codes - zero[group])).T

    return make


def awq(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
    n_out, n_in = shape
    codes, zero = integers(rng, 4, n_in, n_out), integers(rng, 4, n_in // GROUP, n_out)
    scale = scales(rng, n_in // GROUP, n_out, dtype=torch.float16)

    def words(values: torch.Tensor) -> torch.Tensor:
        return packed(values.reshape(len(values), -1, 8)[:, :, AWQ_ORDER].reshape(values.shape), 4)

    group = torch.arange(n_in) // GROUP
    return {"qweight": words(codes), "qzeros": words(zero), "scales": scale}, ((codes - zero[group]) * scale[group]).T


NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
FP4 = [v / 12 for v in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)]
CODES = {"nf4": NF4, "fp4": [*FP4, 0.0, *(-v for v in FP4[1:])]}


def four_bits(kind: str, dtype: str, double: bool) -> Any:
    def make(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
        n, size, outer = shape[0] * shape[1], 64, 16
        codes, table = integers(rng, 4, n), torch.tensor(CODES[kind], dtype=torch.float32)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": dtype, "shape": list(shape)}
        weight = (codes[::2] << 4 | codes[1::2]).to(torch.uint8).reshape(-1, 1)
        pieces = {"weight": weight, "weight.quant_map": table}
        absmax = scales(rng, -(-n // size), dtype=torch.float32, size=0.1)
        pieces["weight.absmax"] = absmax
        if double:
            state |= {"nested_blocksize": outer, "nested_dtype": "float32", "nested_offset": 0.0312}
            quantized, inner = integers(rng, 8, len(absmax)), torch.linspace(-1, 1, 256)
            nested = scales(rng, -(-len(absmax) // outer), dtype=torch.float32, size=0.02)
            pieces |= {
                "weight.absmax": quantized.to(torch.uint8),
                "weight.nested_quant_map": inner,
                "weight.nested_absmax": nested,
            }
            absmax = inner[quantized] * nested.repeat_interleave(outer)[: len(absmax)] + torch.tensor(0.0312)
        text = json.dumps(state).encode()
        pieces[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
        floats = table[codes] * absmax.repeat_interleave(size)[:n]
        return pieces, floats.reshape(shape).to(getattr(torch, dtype))

    return make


def bnb_int8(shape: tuple[int, int], rng: Rng) -> tuple[Pieces, torch.Tensor]:
    weight, scb = integers(rng, 8, *shape).sub(128).to(torch.int8), scales(rng, shape[0], dtype=torch.float32, size=0.1)
    pieces = {"weight": weight, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return pieces, weight * scb[:, None] * 7.874015718698502e-3


def compressed(form: str, bits: int, kind: str, strategy: str, **others: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **others}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def _packed_config(bits: int, **others: Any) -> dict[str, Any]:
    return compressed("pack-quantized", bits, "int", "group", group_size=GROUP, **others)


def _gptq_config(bits: int, form: str | None = None, **others: Any) -> dict[str, Any]:
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, **others}
    return config | ({"checkpoint_format": form} if form else {})


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
PER_TENSOR, PER_ROW = lambda _rows, _columns: (1,), lambda rows, _columns: (rows, 1)
KINDS: dict[str, Kind] = {
    "fp8-blocks": Kind(FP8, fp8(grid, torch.float32, "weight_scale_inv")),
    "fp8-blocks-bf16": Kind(FP8, fp8(grid, torch.bfloat16, "weight_scale_inv")),
    "fp8-blocks-e8m0": Kind({**FP8, "scale_fmt": "ue8m0"}, exponents),
    "fp8-tensor": Kind(
        {**FP8, "weight_block_size": None}, fp8(lambda _rows, _columns: (), torch.bfloat16, "weight_scale_inv")
    ),
    "ct-fp8-tensor": Kind(
        compressed("float-quantized", 8, "float", "tensor"), fp8(PER_TENSOR, torch.bfloat16, "weight_scale")
    ),
    "ct-fp8-channel": Kind(
        compressed("float-quantized", 8, "float", "channel"), fp8(PER_ROW, torch.bfloat16, "weight_scale")
    ),
    "ct-fp8-channel-f32": Kind(
        compressed("float-quantized", 8, "float", "channel"), fp8(PER_ROW, torch.float32, "weight_scale")
    ),
    "ct-fp8-block": Kind(
        compressed("naive-quantized", 8, "float", "block", block_structure=list(BLOCK)),
        fp8(grid, torch.bfloat16, "weight_scale"),
    ),
    "ct-int8": Kind(compressed("int-quantized", 8, "int", "channel"), int8(False)),
    "ct-int8-zeros": Kind(compressed("int-quantized", 8, "int", "channel", symmetric=False), int8(True)),
    "ct-int4": Kind(_packed_config(4), pack_quantized(4)),
    "ct-int4-zeros": Kind(_packed_config(4, symmetric=False), pack_quantized(4, asymmetric=True)),
    "ct-int4-g_idx": Kind(_packed_config(4, actorder="group"), pack_quantized(4, by_index=True)),
    "ct-int3-zeros": Kind(_packed_config(3, symmetric=False), pack_quantized(3, asymmetric=True)),
    "ct-int6": Kind(_packed_config(6), pack_quantized(6)),
    "ct-int8-packed": Kind(_packed_config(8), pack_quantized(8)),
    "gptq-4": Kind(_gptq_config(4), gptq(4, 1)),
    "gptq-4-v2": Kind(_gptq_config(4, "gptq_v2"), gptq(4, 0)),
    "gptq-4-desc_act": Kind(_gptq_config(4, "gptq", desc_act=True), gptq(4, 1, by_index=True)),
    "gptq-4-bf16": Kind(_gptq_config(4, "gptq"), gptq(4, 1, dtype=torch.bfloat16)),
    "gptq-2": Kind(_gptq_config(2, "gptq"), gptq(2, 1)),
    "gptq-3": Kind(_gptq_config(3, "gptq"), gptq(3, 1)),
    "gptq-8": Kind(_gptq_config(8, "gptq"), gptq(8, 1)),
    "awq": Kind({"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq),
    "bnb-nf4": Kind(BNB, four_bits("nf4", "bfloat16", False)),
    "bnb-nf4-double": Kind(BNB, four_bits("nf4", "float16", True)),
    "bnb-fp4": Kind(BNB, four_bits("fp4", "float32", False)),
    "bnb-int8": Kind({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
}
SHAPE = (96, 64)  # of the recorded weights


def state_of(
    kind: str, plain: dict[str, torch.Tensor], apart: tuple[str, ...] = ()
) -> tuple[dict[str, torch.Tensor], Pieces]:
    """(a checkpoint whose projections are quantized, the same with their floats). apart: parts of names that stay floats."""
    quantized, floats = {}, {}
    for name, value in plain.items():
        if not name.endswith("_proj.weight") or any(part in name for part in apart):
            quantized[name] = floats[name] = value
            continue
        module = name.removesuffix(".weight")
        pieces, floats[name] = KINDS[kind].make((value.shape[0], value.shape[1]), rng_of(kind + name))
        quantized |= {f"{module}.{end}": piece for end, piece in pieces.items()}
    return quantized, floats


def digest(floats: torch.Tensor) -> str:
    return hashlib.sha256(floats.float().contiguous().numpy().tobytes()).hexdigest()


def by_library(kind: str) -> torch.Tensor | None:
    """The recorded weight as its own library dequantizes it; None if that does not run here."""
    config = KINDS[kind].config
    pieces, _floats = KINDS[kind].make(SHAPE, rng_of(kind))
    if kind.startswith("fp8"):
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize

        rows, columns = SHAPE  # transformers takes whole blocks alone: the rest of the last ones is filled up
        if pieces["weight_scale_inv"].numel() > 1:
            weight = pieces["weight"].view(torch.uint8)
            down, across = pieces["weight_scale_inv"].shape
            weight = torch.nn.functional.pad(weight, (0, across * BLOCK[1] - columns, 0, down * BLOCK[0] - rows))
            pieces["weight"] = weight.view(torch.float8_e4m3fn)
        found = Fp8Dequantize(None)._dequantize_one(pieces["weight"], pieces["weight_scale_inv"], torch.float32)
        return found[:rows, :columns]
    if kind.startswith("ct") and "g_idx" not in kind:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        scheme = QuantizationScheme(**config["config_groups"]["group_0"])
        found = BaseCompressor.get_value_from_registry(config["format"]).decompress(pieces, scheme)["weight"]
        return torch.as_tensor(found)
    if kind.startswith("bnb"):
        import bitsandbytes

        if "SCB" in pieces:
            return torch.as_tensor(bitsandbytes.functional.int8_vectorwise_dequant(pieces["weight"], pieces["SCB"]))
        stats = {name.removeprefix("weight."): piece for name, piece in pieces.items() if name != "weight"}
        state = bitsandbytes.functional.QuantState.from_dict(stats, device=torch.device("cpu"))
        return torch.as_tensor(bitsandbytes.functional.dequantize_4bit(pieces["weight"], state))
    return None


def main() -> None:
    found = {kind: digest(floats) for kind in KINDS if (floats := by_library(kind)) is not None}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
