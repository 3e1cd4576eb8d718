"""A loaded GGUF: weights, vocabulary, tokenizer.

This uses the low-level API, because `llama_cpp.Llama` passes its own YaRN defaults over the file's values. llama.cpp's log
becomes error messages.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.decoders import check_decoder
from yarn_edge.llama_rules.ends import own_ends
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.template_tokens import unnamed_roles
from yarn_edge.progress import bar
from yarn_edge.runtime import ggml
from yarn_edge.runtime.first_load import check_first_load, trusted
from yarn_edge.runtime.ggml import extra_buffers
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.llama_api import clear_log, failure_reason, kv_overrides, llama
from yarn_edge.runtime.lora import LoadedLoras, LoraFile
from yarn_edge.runtime.tokenizing import Tokenizer
from yarn_edge.signals import deferred_ctrl_c


class Model:
    """A loaded GGUF. Use it as a context manager, or call `close`.

    overrides: metadata values for this load only (str, bool, int or float by key). device: where all layers and the cache go
    (`yarn_edge.runtime.devices`), or how they are split; by default the CPU, even if this build could use a GPU. no_alloc: read
    only the header and the vocabulary; contexts of such a model report their sizes (`yarn_edge.memory.plan`) but cannot run.
    gguf: the header, if it was already read. Raises YarnEdgeError if the file is invalid or llama.cpp refuses it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        vocab_only: bool = False,
        overrides: Mapping[str, str | bool | int | float] | None = None,
        device: ggml.Device | LayerSplit | None = None,
        no_alloc: bool = False,
        gguf: GGUFFile | None = None,
        trust: bool = False,
        repack: bool = True,
    ) -> None:
        self.path = Path(path)
        self.no_alloc = no_alloc
        self.gguf: GGUFFile = gguf or read_gguf(path)
        check_decoder(self.gguf)
        check_loadable(self.gguf)
        self._own_ends = own_ends(self.gguf)
        self.api = llama()
        self.overrides = dict(overrides or {})
        if not trust and not trusted():
            check_first_load(self.gguf, self.api.__version__, vocab_only=vocab_only, overrides=self.overrides)
        params = self.api.llama_model_default_params()
        params.vocab_only = vocab_only
        if no_alloc:
            # llama.cpp asserts that nothing is mapped
            params.no_alloc, params.load_mode = True, self.api.LLAMA_LOAD_MODE_NONE
        self.device = None if device is None or device.kind == "cpu" or _all_on_cpu(device) else device
        params.use_extra_bufts = repack and extra_buffers()
        self._place(params)
        self._overrides = kv_overrides(self.api, self.overrides)
        if self.overrides:
            params.kv_overrides = self._overrides
        self._handle = self._load(params)
        self.loras = LoadedLoras(self.api, self._handle, self.gguf, ())
        self._vocab = self.api.llama_model_get_vocab(self._handle)
        self.n_vocab: int = self.api.llama_vocab_n_tokens(self._vocab)
        self.n_ctx_train: int = self.api.llama_model_n_ctx_train(self._handle)
        self.n_layer: int = self.api.llama_model_n_layer(self._handle)
        # Whether layers have a state that cannot be cut: linear attention and the like (yarn_edge.runtime.recurrent).
        self.recurrent = any(
            map(bool, (f(self._handle) for f in (self.api.llama_model_is_hybrid, self.api.llama_model_is_recurrent)))
        )
        self.bos: int = self.api.llama_vocab_bos(self._vocab)
        self.eos: int = self.api.llama_vocab_eos(self._vocab)
        self.add_bos: bool = self.api.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = self.api.llama_vocab_get_add_eos(self._vocab)

    def _place(self, params: Any) -> None:
        """Say where the layers go. Sizes of `tensor_split` are whole numbers of layers, the output is the last device's."""
        chosen = [device for device in self.devices if device.kind != "cpu"]
        self._devices = (ctypes.c_void_p * (len(chosen) + 1))(*map(ggml.device_handle, chosen))  # terminated by NULL
        params.devices = ctypes.cast(self._devices, ctypes.c_void_p)
        params.n_gpu_layers = -1 if chosen else 0
        if isinstance(self.device, LayerSplit):
            counts = [n for _device, n in self.device.parts]
            params.n_gpu_layers = sum(counts) + 1
            self._tensor_split = (ctypes.c_float * self.api.llama_max_devices())(*counts[:-1], counts[-1] + 1)
            params.tensor_split = self._tensor_split

    @property
    def devices(self) -> tuple[ggml.Device, ...]:
        """Every device that has layers."""
        if isinstance(self.device, LayerSplit):
            return self.device.devices
        return (self.device or ggml.cpu_device(),)

    def _load(self, params: Any) -> Any:
        """llama_model *. Raises YarnEdgeError, and what a signal in the meantime asks for."""
        clear_log()
        with bar(f"Loading {self.path.name}", 1.0, "percent") as advance, deferred_ctrl_c() as pressed:
            shown = [0.0]

            @self.api.llama_progress_callback  # type: ignore[untyped-decorator]
            def report(fraction: float, _user_data: object) -> bool:
                advance(fraction - shown[0])
                shown[0] = fraction
                return not pressed()

            params.progress_callback = report
            handle = self.api.llama_model_load_from_file(os.fsencode(self.path), params)
            if pressed() and handle:
                handle = self.api.llama_model_free(handle)
        if not handle:
            raise YarnEdgeError(f"{self.path}: llama.cpp cannot load it: {failure_reason()}")
        return handle

    def add_loras(self, files: Sequence[LoraFile]) -> None:
        """Let all contexts that are made from now on run with these adapters. Raises YarnEdgeError if one is of another model."""
        self.loras = LoadedLoras(self.api, self.handle, self.gguf, files)

    @property
    def handle(self) -> Any:
        """llama_model *, for the low-level API."""
        if self._handle is None:
            raise YarnEdgeError(f"{self.path}: the model was closed")
        return self._handle

    @property
    def vocab(self) -> Any:
        """llama_vocab *, for the low-level API."""
        return self._vocab

    @cached_property
    def positions(self) -> FilePositions:
        """The file's positions as llama.cpp sees them, with this load's overrides."""
        return FilePositions(self.gguf).with_metadata(self.overrides)

    @property
    def chat_template(self) -> str | None:
        """The file's `tokenizer.chat_template`, None if it has none."""
        value = self.gguf.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

    def template_token(self, role: str) -> str:
        """What chat templates read as "bos" or "eos": its text, "" if there is none (`unnamed_roles`)."""
        token = {"bos": self.bos, "eos": self.eos}[role]
        if token < 0 or role in unnamed_roles(self.gguf):
            return ""
        return self.token_bytes(token).decode("utf-8", "replace")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, which knows where long texts can be cut."""
        return Tokenizer(self._vocab, {**self.gguf.metadata, **self.overrides}, str(self.path), self._own_ends)

    def tokenize(
        self,
        text: str,
        *,
        add_special: bool,
        parse_special: bool,
        at_most: int | None = None,
        until: float | None = None,
    ) -> list[int]:
        """Token ids of `text`: `Tokenizer.tokenize`."""
        return self.tokenizer.tokenize(text, add_special, parse_special, at_most, until)

    def token_bytes(self, token: int, *, special: bool = True) -> bytes:
        """The bytes of one token: `Tokenizer.token_bytes`."""
        return self.tokenizer.token_bytes(token, special)

    def is_end(self, token: int) -> bool:
        """Whether the token ends a generation, for llama.cpp or by the file's own list (`yarn_edge.llama_rules.ends`)."""
        return token in self._own_ends or self.is_end_in_llama_cpp(token)

    def is_end_in_llama_cpp(self, token: int) -> bool:
        """Whether the token ends a generation in every program that asks llama.cpp (EOS, end of turn, …)."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def close(self) -> None:
        """Free the weights. Contexts of the model must be closed first."""
        with deferred_ctrl_c():
            if self._handle:
                self.api.llama_model_free(self._handle)
            self._handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _all_on_cpu(device: ggml.Device | LayerSplit) -> bool:
    return isinstance(device, LayerSplit) and not device.parts
