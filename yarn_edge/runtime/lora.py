"""LoRA adapters as GGUF, added to a loaded model: what `--lora FILE[=SCALE]` names.

llama.cpp computes them beside the weights, which stay as they are. Every context of a model runs with its adapters.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from yarn_edge.checkpoint.adapter import path_and_number
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.lora_rules import LORA_B, check_adapter
from yarn_edge.progress import note
from yarn_edge.regular_file import digest, open_regular
from yarn_edge.runtime.llama_api import clear_log, failure_reason
from yarn_edge.signals import deferred_ctrl_c

_STEP_BYTES = 1 << 20
_MOST_SCALE = 1e6
_GRAPH_TOKENS, _GRAPH_COPIES = 512, 3  # of a product: as it is made, scaled, added


@dataclass(frozen=True)
class LoraFile:
    """A GGUF adapter and how much of it is added: 1 for what was trained."""

    gguf: GGUFFile
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
        """From FILE or FILE=SCALE. Raises YarnEdgeError."""
        file, scale = path_and_number(text)
        if not abs(scale) <= _MOST_SCALE:
            given = one_line(repr(text.rpartition("=")[2]), 40)
            raise YarnEdgeError(f"--lora {one_line(text, 200)}: {given} is not a scale")
        return cls(read_gguf(file), scale)

    @property
    def name(self) -> str:
        """The file's name, with the scale unless that is 1."""
        return self.gguf.path.name + ("" if self.scale == 1 else f"={self.scale:g}")

    @cached_property
    def identity(self) -> str:
        """A hash of the whole file and the scale, whatever the file is called."""
        with open_regular(self.gguf.path) as file:
            return f"{digest(file)} {float(self.scale)!r}"

    @property
    def n_bytes(self) -> int:
        """Memory that it takes: its tensors, and the products in the graph of a batch."""
        rows = max((t.shape[1] for t in self.gguf.tensors.values() if t.name.endswith(LORA_B)), default=0)
        return self.gguf.weight_bytes + 4 * _GRAPH_COPIES * _GRAPH_TOKENS * rows

    def changes_nothing(self) -> bool:
        """Whether all products are zero, as LoRA starts."""
        with open_regular(self.gguf.path) as file:
            for tensor in self.gguf.tensors.values():
                file.seek(tensor.offset)
                left = tensor.n_bytes if tensor.name.endswith(LORA_B) else 0
                while left > 0 and (data := file.read(min(left, _STEP_BYTES))):
                    if any(data):
                        return False
                    left -= len(data)
        return True


class LoadedLoras:
    """Adapters of one model, in llama.cpp. They are freed with the model."""

    def __init__(self, api: Any, model: Any, base: GGUFFile, files: Sequence[LoraFile]) -> None:
        self.files = tuple(file for file in files if file.scale)
        self._api = api
        handles = []
        for file in files:
            check_adapter(file.gguf, base)
            if not file.scale or file.changes_nothing():
                note(f"warning: {file.gguf.path} changes nothing: its {'products are' if file.scale else 'scale is'} 0")
        for file in self.files:
            clear_log()
            with deferred_ctrl_c():
                handle = api.llama_adapter_lora_init(model, os.fsencode(file.gguf.path))
            if not handle:
                raise YarnEdgeError(f"{file.gguf.path}: llama.cpp cannot load it: {failure_reason()}")
            handles.append(handle)
        self._handles = (api.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        self._scales = (ctypes.c_float * len(handles))(*(file.scale for file in self.files))

    def add_to(self, context: Any) -> None:
        """Let a context (llama_context *) run with them."""
        if self.files:
            self._api.llama_set_adapters_lora(context, self._handles, len(self.files), self._scales)
