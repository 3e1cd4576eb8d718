"""A model and how to run it, in one word: `model.gguf@kv=q4_0,yarn-factor=2`.

This separates the errors of weights, cache and positions: the same file runs with another cache type, another backend or another
scaling, through runtime arguments and metadata overrides in memory. No file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import BACKENDS, FLAGS, ScalingOverrides, parse_length
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.rescale import from_file, in_memory
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.context_settings import Attention, ContextSettings
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.ggml import Device
from yarn_edge.runtime.kv_cache import KV_TYPES, kv_types, with_kv_parts
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.lora import LoraFile
from yarn_edge.runtime.model import Model

# key of a variant -> RopeScaling field, with the flags' own names and types
_SCALING: dict[str, str] = {flag.removeprefix("--"): name for name, flag in FLAGS.items()}
KV_KEYS = ("kv", "kv-k", "kv-v")
KEYS = (*KV_KEYS, "backend", "lora", *_SCALING)


@dataclass(frozen=True)
class Variant:
    """A file and how to run it. arguments: None for the file's own scaling; overrides: metadata values for this load only.

    loras: adapters to add. split: of the layers over several devices, in place of the backend.
    """

    label: str
    gguf: GGUFFile
    kv_type: str = "f16"
    backend: str = "cpu"
    arguments: RuntimeArguments | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)
    loras: tuple[LoraFile, ...] = ()
    split: LayerSplit | None = None

    @property
    def path(self) -> Path:
        """The file; of a split one the first."""
        return self.gguf.path

    @property
    def weights(self) -> tuple[Any, ...]:
        """A key that is equal for variants that can share a loaded model."""
        return (self.path.resolve(), self.split or self.backend, tuple(sorted(self.overrides.items())), self.adapters)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The identities of its adapters."""
        return tuple(lora.identity for lora in self.loras)

    def device(self) -> Device | LayerSplit:
        """The device to run on, or the split. Raises YarnEdgeError if this machine has no such backend; it is never replaced by another."""
        if self.split is not None:
            return self.split
        devices = devices_of(self.backend)
        if not devices:
            raise YarnEdgeError(f"{self.label}: {missing(self.backend)}")
        return devices[0]

    def load(self) -> Model:
        """The loaded model, on its backend. Raises YarnEdgeError."""
        model = Model(self.path, device=self.device(), overrides=self.overrides, gguf=self.gguf)
        try:
            model.add_loras(self.loras)
        except BaseException:
            model.close()
            raise
        return model

    def settings(
        self, *, n_ctx: int, n_batch: int, threads: int | None = None, attention: Attention = "auto"
    ) -> ContextSettings:
        """The settings of a context of this variant; "auto" leaves attention to llama.cpp."""
        return ContextSettings(
            n_ctx=n_ctx,
            n_batch=n_batch,
            kv_type=self.kv_type,
            threads=threads,
            arguments=self.arguments,
            attention=attention,
        )


def parse_variant(text: str, *, kv_type: str = "f16", backend: str = "cpu", loras: Sequence[LoraFile] = ()) -> Variant:
    """The variant written as `PATH` or `PATH@key=value,key=value`, with the keys KEYS. The others are defaults. Raises YarnEdgeError."""
    path, wanted = split_variant(text)
    given: dict[str, Any] = {}
    for item in wanted:
        key, _, value = item.partition("=")
        if key not in KEYS:
            raise YarnEdgeError(f"{text}: {key!r} is unknown after @; known: {', '.join(KEYS)}")
        if key in given:
            raise YarnEdgeError(f"{text}: {key} appears twice")
        given[key] = _VALUES[key](text, value)
    scaling = ScalingOverrides(**{_SCALING[key]: value for key, value in given.items() if key in _SCALING})
    kv_type = with_kv_parts(given.get("kv", kv_type), given.get("kv-k"), given.get("kv-v"))
    added = given.get("lora", tuple(loras))
    label = text if "lora" in given else "".join([text, *(f" + {lora.name}" for lora in added)])
    variant = Variant(label, read_gguf(path), kv_type, given.get("backend", backend), loras=added)
    return scaled(variant, from_file(FilePositions(variant.gguf), scaling)) if scaling else variant


def on_devices(variant: Variant, split: LayerSplit) -> Variant:
    """The variant with its layers split; its backend is then the split's name."""
    return replace(variant, split=split, backend=split.name)


def split_variant(text: str) -> tuple[str, list[str]]:
    """(path, items after the last @). A file whose own name contains an @ is taken as it is."""
    path, at, rest = text.rpartition("@")
    if not at or "=" not in rest or Path(text).exists():
        return text, []
    return path, rest.split(",")


def _number(kind: Callable[[str], float]) -> Callable[[str, str], float]:
    def parse(text: str, value: str) -> float:
        try:
            return kind(value)
        except ValueError:
            raise YarnEdgeError(f"{text}: {value!r} is not a number") from None

    return parse


def _one_of(names: Mapping[str, Any]) -> Callable[[str, str], str]:
    def parse(text: str, value: str) -> str:
        if value not in names:
            raise YarnEdgeError(f"{text}: {value!r} is unknown; known: {', '.join(names)}")
        return value

    return parse


def _kv_type(text: str, value: str) -> str:
    kv_types(value, f"{text}:")
    return value


_VALUES: dict[str, Callable[[str, str], Any]] = {
    "kv": _kv_type,
    "kv-k": _one_of(KV_TYPES),
    "kv-v": _one_of(KV_TYPES),
    "backend": _one_of(BACKENDS),
    "lora": lambda _text, value: (LoraFile.parse(value),),
    **{key: _number(parse_length if name == "original_context" else float) for key, name in _SCALING.items()},
}


def scaled(variant: Variant, goal: RopeScaling) -> Variant:
    """The variant with `goal` in place of the file's own scaling. Raises YarnEdgeError if runtime arguments cannot express it."""
    arguments, overrides = in_memory(FilePositions(variant.gguf), goal, variant.label)
    return replace(variant, arguments=arguments, overrides=overrides)
