"""Which type each tensor gets. llama.cpp decides; only its short list of types that need importance is copied here.

`llama_model_quantize` with `dry_run` reads only a file's header and logs its decision for every tensor. It gets a sparse file
with the architecture's keys, the tensor infos and the length of the 16-bit GGUF, but no data.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf.header import TensorSpec, lay_out
from yarn_edge.runtime.ggml_types import QUANTIZABLE, GGMLType, type_named
from yarn_edge.runtime.llama_api import captured_log, failure_reason, llama
from yarn_edge.signals import deferred_ctrl_c
from yarn_edge.writer import open_output, scratch_folder

from .quant_types import Quant

# The log for each tensor, written in two calls: "[  1/ 10] NAME - [NE], type = TYPE, " and "size = A MiB -> B MiB (TYPE)".
_TENSOR = re.compile(r"\[\s*\d+/\s*\d+\] (?P<name>.*?)\s+- \[[^\]]*\], type =\s+(?P<kind>\S+), $", re.DOTALL)
_SIZE = re.compile(r"size = [^(]*(?:\((?P<kind>\w+)\))?\s*$")
_FALLBACK = re.compile(
    r"warning: (?P<name>.*?)\s+- ncols\s+(?P<width>\d+) not divisible by\s+(?P<block>\d+) \(required for type\s+(?P<wanted>\w+)\)",
    re.DOTALL,
)
# llama-quant.cpp, tensor_requires_imatrix: these tensor types, and one type in one kind of file; never the embeddings.
_REQUIRES = frozenset({"IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S"})
_REQUIRES_IN_FILE = frozenset({("Q2_K", "Q2_K_S")})
_NEVER_REQUIRE = frozenset({"token_embd.weight", "per_layer_token_embd.weight", "output.weight"})
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
_ONE_AT_A_TIME = threading.Lock()  # llama.cpp has one log for the whole process
_NO_TYPE = 43  # GGML_TYPE_COUNT, which means "not given" in llama_model_quantize_params


@dataclass(frozen=True)
class QuantOptions:
    """How to quantize, beyond the file type.

    imatrix: an importance matrix by `yarn-edge imatrix` or llama-imatrix. kernels: "fast", "ggml", or None for whichever is
    faster. pure: one type for all tensors. tensor_types: (regular expression, type) pairs; the first that matches a tensor's
    name counts. output_type, embedding_type: of output.weight and token_embd.weight.
    """

    imatrix: str | Path | None = None
    kernels: str | None = None
    pure: bool = False
    tensor_types: tuple[tuple[str, GGMLType], ...] = ()
    output_type: GGMLType | None = None
    embedding_type: GGMLType | None = None

    @property
    def files(self) -> list[Path]:
        """The files that these options name."""
        return [] if self.imatrix is None else [Path(self.imatrix)]


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows the wanted type cannot hold, so that llama.cpp uses another."""

    name: str
    width: int
    wanted: str
    used: str


@dataclass(frozen=True)
class Recipe:
    """The types of one file, by tensor name. fallbacks: types that were replaced. requires_importance: tensors that cannot be
    quantized without importance weights. without_effect: patterns of `QuantOptions.tensor_types` that change no type."""

    quant: Quant
    types: Mapping[str, GGMLType]
    fallbacks: tuple[Fallback, ...] = ()
    requires_importance: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()


@contextmanager
def header_file(entries: Sequence[bytes], tensors: Sequence[TensorSpec]) -> Iterator[Path]:
    """A temporary GGUF of the right length that has only its header, for `read_recipe`."""
    layout = lay_out(entries, tensors)
    with scratch_folder("yarn-edge-") as folder:
        path = folder / "header.gguf"
        try:
            with open_output(path) as file:
                file.write(layout.header)
                file.truncate(layout.file_bytes)
        except OSError as error:
            raise os_error(error, path) from error
        yield path


def read_recipe(
    path: Path, widths: Mapping[str, int], quant: Quant, options: QuantOptions, kept: Mapping[str, GGMLType] = {}
) -> Recipe:
    """Ask llama.cpp which types the tensors of the GGUF `path` get. widths: row width by tensor name. kept: types that stay.

    Raises YarnEdgeError with llama.cpp's reason if it refuses, or for a type that some rows cannot hold.
    """
    _check_widths(widths, options)
    types, log = _ask(path, quant, options, kept)
    if types.keys() != widths.keys():
        raise YarnEdgeError(
            f"{path}: llama.cpp lists {len(types)} of {len(widths)} tensors: install the pinned version"
        )
    for name, kind in types.items():
        if kind.name in QUANTIZABLE and not kind.holds(widths[name]):
            raise YarnEdgeError(
                f"tensor {one_line(name, 100)}: rows of {widths[name]} do not hold whole {kind.name} blocks"
            )
    fallbacks = tuple(
        Fallback(m["name"], int(m["width"]), m["wanted"].upper(), types[m["name"]].name)
        for m in map(_FALLBACK.match, log)
        if m and m["name"] in types and m["name"] not in kept
    )
    requires = tuple(
        name
        for name, kind in types.items()
        if name not in _NEVER_REQUIRE and (kind.name in _REQUIRES or (kind.name, quant.name) in _REQUIRES_IN_FILE)
    )
    return Recipe(quant, types, fallbacks, requires, _without_effect(path, quant, options, types, kept))


def _without_effect(
    path: Path, quant: Quant, options: QuantOptions, types: Mapping[str, GGMLType], kept: Mapping[str, GGMLType]
) -> tuple[str, ...]:
    """The --tensor-type patterns without which the types would be the same: most likely a mistake."""
    idle = []
    for index, (pattern, _kind) in enumerate(options.tensor_types):
        others = options.tensor_types[:index] + options.tensor_types[index + 1 :]
        if _ask(path, quant, replace(options, tensor_types=others), kept)[0] == types:
            idle.append(pattern)
    return tuple(idle)


def _check_widths(widths: Mapping[str, int], options: QuantOptions) -> None:
    """llama.cpp does not check --output-type and --embedding-type, and ends the process if rows do not fit."""
    given = (((OUTPUT,), options.output_type), (EMBEDDINGS, options.embedding_type))
    for names, kind in given:
        for name in names:
            if kind is not None and name in widths and not kind.holds(widths[name]):
                raise YarnEdgeError(
                    f"{name}: rows of {widths[name]} do not hold whole {kind.name} blocks of {kind.block}"
                )


def _ask(
    path: Path, quant: Quant, options: QuantOptions, kept: Mapping[str, GGMLType]
) -> tuple[dict[str, GGMLType], list[str]]:
    """A dry run: (type of every tensor by name, the log)."""
    api = llama()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread, params.pure = quant.ftype, True, 1, options.pure
    params.allow_requantize = True  # the caller checks whether the user allows it
    params.output_tensor_type = _number(options.output_type)
    params.token_embedding_type = _number(options.embedding_type)
    patterns = (api.llama_model_tensor_override * (len(options.tensor_types) + 1))()
    for item, (pattern, kind) in zip(patterns, options.tensor_types, strict=False):
        item.pattern, item.type = pattern.encode(), kind.number
    patterns[-1].pattern, patterns[-1].type = None, _NO_TYPE
    if options.tensor_types:
        params.tt_overrides = patterns
    held = _some_importance(api)
    if options.imatrix is not None:
        params.imatrix = held
    with _ONE_AT_A_TIME, deferred_ctrl_c(), captured_log() as log:
        failed = api.llama_model_quantize(os.fsencode(path), b"", ctypes.byref(params))
        reason = failure_reason().removeprefix("failed to quantize: ") if failed else ""
    if failed:
        asked = "".join(f" --tensor-type {pattern}={kind.name}" for pattern, kind in options.tensor_types[:3])
        raise YarnEdgeError(f"llama.cpp has no recipe for {quant.name}{one_line(asked, 200)} for this model: {reason}")
    types: dict[str, GGMLType] = {}
    for line, size in pairwise(log):
        tensor, new = _TENSOR.match(line), _SIZE.match(size)
        if tensor and new:
            types[tensor["name"]] = type_named(new["kind"] or tensor["kind"])
    return {**types, **kept}, log


def _number(kind: GGMLType | None) -> int:
    return _NO_TYPE if kind is None else kind.number


def _some_importance(api: Any) -> Any:
    """An importance matrix of one number: a dry run only looks whether there is one."""
    held = (api.llama_model_imatrix_data * 2)()
    held[0].name, held[0].size = b"-", 1
    held[0].data = (ctypes.c_float * 1)(1.0)
    held[1].name = None
    return held
