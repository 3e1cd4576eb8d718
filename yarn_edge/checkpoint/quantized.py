"""Quantized checkpoints: which method made them, from config.json or from the tensors' names, and how to get floats.

One row a method. A `quantization_config` may also be a leftover, as when a LoRA was merged into the original weights of a model
that had been loaded in 4 bits: then every tensor is a plain float.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.errors import YarnEdgeError, one_line

ORIGINAL = "take the original checkpoint"
_CALL = f"{ORIGINAL}, or load it with transformers, call model.dequantize() and save_pretrained"
_KEYS = ("quantization_config", "compression_config", "quantization")


def _with(name: str) -> str:
    return (
        f"{ORIGINAL}, or load it with transformers and quantization_config={name}(dequantize=True), and save_pretrained"
    )


@dataclass(frozen=True)
class QuantMethod:
    """One method. keys: values of quant_method. marks: a pattern of names that only its tensors have.

    runs_quantized: the model computes with quantized values even if its file holds floats, so these floats are not the model.
    read_as: ggml's type that holds the same bits, in which its tensors are read; "" if they are refused.
    dequantized: convert reads the weights as floats (convert/sources).
    """

    title: str
    keys: tuple[str, ...]
    marks: str = ""
    remedy: str = ORIGINAL
    runs_quantized: bool = False
    read_as: str = ""
    dequantized: bool = False


# Sources: transformers/quantizers, and the files that each library writes. Of two rows whose marks fit, the first counts.
METHODS: tuple[QuantMethod, ...] = (
    QuantMethod(
        "bitsandbytes",
        ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"),
        r"\.(?:absmax|quant_map|nested_absmax|quant_state\.\w+|SCB|weight_format)$",
        _CALL,
        dequantized=True,
    ),
    QuantMethod("GPTQ", ("gptq",), r"\.g_idx$", dequantized=True),
    QuantMethod("Marlin", ("marlin",)),
    QuantMethod("AWQ", ("awq",), dequantized=True),
    QuantMethod("AutoRound", ("auto-round", "intel/auto-round")),
    QuantMethod("GPTQ or AWQ", (), r"\.(?:qweight|qzeros)$"),
    QuantMethod("FP8", ("fp8",), r"_scale_inv$", _with("FineGrainedFP8Config"), dequantized=True),
    QuantMethod("FBGEMM FP8", ("fbgemm_fp8",), r"\.input_scale_ub$"),
    QuantMethod("ModelOpt", ("modelopt",)),
    QuantMethod("NVFP4", ("nvfp4",), r"\.weight_scale_2$"),
    QuantMethod(
        "compressed-tensors",
        ("compressed-tensors", "compressed_tensors"),
        r"\.(?:weight_packed|weight_scale|weight_zero_point|input_scale)$",
        _with("CompressedTensorsConfig"),
        dequantized=True,
    ),
    QuantMethod("HQQ", ("hqq",), r"\.W_q(?:\.\w+)?$"),
    QuantMethod("AQLM", ("aqlm",), r"\.(?:codes|codebooks)$"),
    QuantMethod("VPTQ", ("vptq",), r"\.(?:centroids|indices|res_centroids)(?:\.weight)?$"),
    QuantMethod("SpQR", ("spqr",), r"\.(?:dense_weights|row_offsets|col_vals)$"),
    QuantMethod("QuIP#", ("quip",), r"\.Qidxs\w*$"),
    QuantMethod("EETQ", ("eetq",), r"\.weight_scales$"),
    QuantMethod("HIGGS", ("higgs",), "", _CALL),
    QuantMethod("Quanto", ("quanto",), r"\.weight\._(?:data|scale|shift)\w*$"),
    QuantMethod("torchao", ("torchao",), r"\.(?:_weight_qdata|_weight_scale|weight_qdata)$"),
    QuantMethod("MXFP4", ("mxfp4",), r"_(?:blocks|scales)$", _with("Mxfp4Config"), read_as="MXFP4"),
    QuantMethod("MXFP8", ("mxfp8",)),
    QuantMethod("EXL3", ("exl3",), r"\.(?:trellis|suh|svh)$"),
    QuantMethod("EXL2", ("exl2",), r"\.(?:q_weight|q_invperm|q_scale_max)$"),
    QuantMethod("MLX", ("mlx",), r"\.biases$", f"{ORIGINAL}, or use mlx_lm.convert --dequantize"),
    QuantMethod("SINQ", ("sinq",)),
    QuantMethod("Metal", ("metal",)),
    QuantMethod("Quark", ("quark",), "", runs_quantized=True),
    QuantMethod("BitNet", ("bitnet",), "", runs_quantized=True),
    QuantMethod("Gemma", ("gemma",), "", runs_quantized=True),
    QuantMethod("FP-Quant", ("fp_quant",), r"\.(?:forward_hadamard_matrix|qweight_master)$", runs_quantized=True),
    QuantMethod("Four Over Six", ("fouroversix",), "", runs_quantized=True),
)


def _declared(config: ConfigFile) -> tuple[str, Any] | None:
    """(key, value) by which config.json says that the model is quantized."""
    return next(((key, config.values[key]) for key in _KEYS if config.values.get(key) is not None), None)


def quantization_section(config: ConfigFile) -> ConfigFile | None:
    """What config.json says about quantization; None if that is nothing, or no object."""
    declared = _declared(config)
    return config.section(declared[0]) if declared and isinstance(declared[1], dict) else None


def is_marked(name: str) -> bool:
    """Whether only quantized weights have tensors of such a name."""
    return any(row.marks and re.search(row.marks, name) for row in METHODS)


def declared_method(config: ConfigFile) -> QuantMethod | None:
    """The method that config.json names, ModelOpt with its algorithm; None if it names none, or one that is not in the table."""
    declared = _declared(config)
    block = declared[1] if declared else None
    if not isinstance(block, dict):
        return None
    name = block.get("quant_method")
    if name is None and (block.get("load_in_4bit") or block.get("load_in_8bit")):
        name = "bitsandbytes"
    if name is None and "quantization" in config.values:  # mlx_lm writes it, and a copy as quantization_config
        name = "mlx"
    row = next((row for row in METHODS if isinstance(name, str) and name.lower() in row.keys), None)
    algorithm = block.get("quant_algo")
    if row is not None and isinstance(algorithm, str):
        return replace(row, title=f"{row.title} {one_line(algorithm, 20)}")
    return row


def left_over(config: ConfigFile) -> bool:
    """Whether a quantization_config says nothing about weights that are floats. Whether they are is not looked at."""
    method = declared_method(config)
    return method is not None and not method.runs_quantized


def refuse_quantized(config: ConfigFile, source: str, dtypes: Mapping[str, str], floats: Collection[str]) -> None:
    """Raise YarnEdgeError, with method and remedy, if weights are quantized.

    source: the checkpoint, for messages. dtypes: of all weights, by name. floats: those that are not quantized. Integers in a
    checkpoint without any sign of quantization are not judged here.
    """
    declared, method = _declared(config), declared_method(config)
    marked = ((name, row) for row in METHODS if row.marks for name in dtypes if re.search(row.marks, name))
    others = ((name, None) for name, dtype in dtypes.items() if dtype not in floats)
    name, row = next(marked, None) or next(others, (None, None))
    row = method or row
    if name is None or (row is None and declared is None):
        return
    evidence = f"tensor {one_line(name, 100)}"
    if dtypes[name] not in floats:
        evidence += f" has dtype {one_line(dtypes[name], 20)}"
    if declared:
        evidence = f"config.json: {declared[0]}; {evidence}"
    by, remedy = (f" by {row.title}", row.remedy) if row else ("", ORIGINAL)
    raise YarnEdgeError(f"{source}: is quantized{by} ({evidence}), and only floats can be read: {remedy}")


_SETTINGS = (
    "bits",
    "group_size",
    "checkpoint_format",
    "version",
    "format",
    "weight_block_size",
    "bnb_4bit_quant_type",
    "quant_algo",
)


def quantization_notes(config: ConfigFile) -> tuple[str, ...]:
    """What config.json says about quantized weights, and what convert does with them. The weights are not looked at."""
    section, method = quantization_section(config), declared_method(config)
    if section is None:
        return ()
    if method is None:
        key = section.prefix[:-1]
        return (f"{config.short}: {key} names no known method of quantization, so convert takes no weights by it",)
    settings = ", ".join(f"{key} {shown(section.values[key])}" for key in _SETTINGS if key in section.values)
    by = f"{config.short} says that weights are quantized by {method.title}{settings and f' ({settings})'}"
    done = f"convert keeps them as {method.read_as}" if method.read_as else "convert dequantizes them"
    return (
        f"{by}: {done if method.dequantized or method.read_as else f'convert does not read them: {method.remedy}'}",
    )


def left_over_note(config: ConfigFile) -> str:
    """For weights that are floats, a note on a leftover quantization_config; "" if there is none.

    Raises YarnEdgeError if the model would quantize them while it runs, or nobody knows what it would do.
    """
    declared, method = _declared(config), declared_method(config)
    if declared is None:
        return ""
    key, block = declared
    if method is None:
        what = f"is {shown(block)}, which names no known method, and the weights are floats: if they are not quantized, remove it"
        raise config.error(key, what)
    if method.runs_quantized:
        what = f"names {method.title}, which computes with quantized values though the weights are floats: {ORIGINAL}"
        raise config.error(key, what)
    return f"note: all weights are floats, so {key} ({method.title}) in config.json is a leftover: ignored"
