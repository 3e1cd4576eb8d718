"""llama.cpp's own quantizer, and files that must be the same."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from yarn_edge.convert.quant_types import known_quants
from yarn_edge.runtime.llama_api import llama


def upstream(source: Path, target: Path, quant: str, importance: Path | None = None, **params: Any) -> Path:
    """llama.cpp's own quantizer, called as its tool calls it. Returns `target`."""
    api = llama()
    asked = api.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = known_quants()[quant].ftype, 2
    kept: list[Any] = []
    if importance is not None:
        reader = gguf.GGUFReader(importance)
        tensors = {t.name: t.data for t in reader.tensors}
        names = sorted(n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2"))
        held = (api.llama_model_imatrix_data * (len(names) + 1))()
        for item, name in zip(held, names, strict=False):
            values = (tensors[f"{name}.in_sum2"] / tensors[f"{name}.counts"]).astype(np.float32).ravel()
            item.name, item.size = name.encode(), values.size
            item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            kept.append(values)
        held[len(names)].name = None
        asked.imatrix = held
    for key, value in params.items():
        setattr(asked, key, value)
    assert api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(asked)) == 0
    return target


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    reader = gguf.GGUFReader(path)
    return {t.name: (t.tensor_type.name, tuple(t.shape), t.data.tobytes()) for t in reader.tensors}


def keys_of(path: Path) -> dict[str, Any]:
    skip = ("GGUF.", "quantize.imatrix.", "yarn_edge.quantizer")
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith(skip)}


def assert_same_file(ours: Path, theirs: Path) -> None:
    assert tensors_of(ours) == tensors_of(theirs)
    assert keys_of(ours) == keys_of(theirs)
