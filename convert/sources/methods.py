"""The quantized weights of a checkpoint as floats: which reader a quantization_config asks for, and whether it tells the truth.

What a reader does not know is left, and left for `refuse_quantized` to name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.quantized import declared_method, is_marked, quantization_section
from yarn_edge.errors import one_line

from ..stored import DTYPES, Tensor
from .bitsandbytes import read_bitsandbytes
from .compressed import listed_apart, read_compressed
from .fp8 import read_fp8
from .gptq import left_out_by_dynamic, read_awq, read_gptq
from .pieces import Pieces, kind_of, matches


@dataclass(frozen=True)
class MethodReader:
    """read: takes a method's tensors from `Pieces`, makes the floats, and returns in words what the weights are.

    lists: keys of quantization_config with the modules that are not quantized. apart: whether it says so in another way.
    """

    read: Callable[[Pieces], str]
    lists: tuple[str, ...] = ()
    apart: Callable[[ConfigFile, str], bool] = lambda _config, _module: False


@dataclass(frozen=True)
class Dequantized:
    """tensors: all of a checkpoint, floats. what: how the weights were quantized, "" if they were not."""

    tensors: dict[str, Tensor]
    what: str = ""
    notes: tuple[str, ...] = ()


_NOT_CONVERTED = ("modules_to_not_convert", "ignored_layers")
# By quant_method.
READERS: dict[str, MethodReader] = {
    "fp8": MethodReader(read_fp8, _NOT_CONVERTED),
    "compressed-tensors": MethodReader(read_compressed, apart=listed_apart),
    "gptq": MethodReader(read_gptq, apart=left_out_by_dynamic),
    "awq": MethodReader(read_awq, _NOT_CONVERTED),
    "bitsandbytes": MethodReader(read_bitsandbytes, ("llm_int8_skip_modules",)),
}
# What only a program that computes with quantized activations or a quantized cache needs.
_OF_ACTIVATIONS = re.compile(
    r"\.(?:(?:activation|input|output|k|v|q|kv)_scale|(?:k_proj|v_proj|q_proj)\.output_scale|(?:input|output)_zero_point)$"
)
_FEW_BITS = re.compile(r"\b(?:[2-6]|NF4|FP4)(?: bits|-bit|, blocks)")


def dequantized(config: ConfigFile, source: str, weights: Mapping[str, Tensor]) -> Dequantized:
    """The weights of a checkpoint, those that its quantization_config tells how to dequantize as floats.

    Raises YarnEdgeError for tensors that are missing or of other shapes, and for a config that contradicts the tensors. Weights of
    methods without a reader are left as they are.
    """
    method, section = declared_method(config), quantization_section(config)
    reader = next((READERS[key] for key in method.keys if key in READERS), None) if method else None
    plain = all(tensor.dtype in DTYPES and not is_marked(name) for name, tensor in weights.items())
    if reader is None or section is None or plain:
        return Dequantized(dict(weights))
    pieces = Pieces(source, section, dict(weights))
    what = reader.read(pieces)
    if not pieces.made:
        return Dequantized(dict(weights))
    scales = [name for name in pieces.left if _OF_ACTIVATIONS.search(name)]
    for name in scales:
        del pieces.left[name]
    _check_lists(pieces, reader)
    tensors: dict[str, Tensor] = {}
    for name in weights:
        if name in pieces.made:
            tensors[pieces.made[name].name] = pieces.made[name]
        elif name in pieces.left:
            tensors[name] = pieces.left[name]
    notes = [f"note: {len(pieces.made)} weights are quantized by {what}: dequantized while they are read"]
    if _FEW_BITS.search(what):
        notes[0] += (
            ". What few bits lost stays lost, and quantizing anew adds its own loss: prefer the original checkpoint if there is one"
        )
    if scales:
        notes.append(
            f"note: {len(scales)} scales of activations or of the KV cache are left out (llama.cpp does not quantize these by them): "
            f"{one_line(scales[0], 100)}"
        )
    return Dequantized(tensors, what, tuple(notes))


def _check_lists(pieces: Pieces, reader: MethodReader) -> None:
    """Raise YarnEdgeError for weights that are quantized though the config lists them as not, or are not though others of their kind
    are, and for what is left of a quantized weight."""
    listed = _listed(pieces.config, reader)
    made = [tensor.name for tensor in pieces.made.values()]
    quantized: dict[str, str] = {}
    modules: set[str] = set()
    for name in made:
        quantized.setdefault(kind_of(name), name)
        module = name.removesuffix(".weight")
        if listed(module):
            raise pieces.error(
                name, f"is quantized, but {pieces.config.prefix[:-1]} lists {one_line(module, 100)} as not: correct it"
            )
        modules.add(module)
    plain: defaultdict[str, list[str]] = defaultdict(list)
    for name in pieces.left:
        plain[kind_of(name)].append(name)
        parts = name.split(".")
        if parts[-1] != "bias" and any(".".join(parts[:n]) in modules for n in range(1, len(parts))):
            raise pieces.error(
                name, "belongs to a quantized weight, and what it does there is not known: take the original checkpoint"
            )
    for kind, example in quantized.items():
        for name in plain[kind]:
            if not listed(name.removesuffix(".weight")):
                what = f"is not quantized, but {one_line(example, 100)} is, and {pieces.config.prefix[:-1]} does not say so: correct it"
                raise pieces.error(name, what)


def _listed(config: ConfigFile, reader: MethodReader) -> Callable[[str], bool]:
    """Whether the config says that a module is not quantized (transformers, quantizers_utils.py: should_convert_module)."""
    patterns: list[str] = []
    for key in reader.lists:
        found = config.values.get(key)
        patterns += [p for p in found if isinstance(p, str) and p] if isinstance(found, list) else []

    def listed(module: str) -> bool:
        names = {module, module.removeprefix("model."), f"model.{module}"}
        at_start = any(matches(rf"(?:{p})(?:(?<=\.)|(?=\.|$))", name) for p in patterns for name in names)
        at_end = any(module.endswith(p) for p in patterns)
        return at_start or at_end or any(reader.apart(config, name) for name in names)

    return listed
