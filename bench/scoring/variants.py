"""A model and how to run it, in one word: `model.gguf@kv=q4_0,yarn-factor=2`.

So the errors of weights, cache and positions can be told apart: the same file runs with another cache type, another backend
or another scaling, by arguments of the runtime and overrides of its metadata in memory; no file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import BACKENDS, FLAGS, ScalingOverrides
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.rescale import from_file, in_memory
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.attention import FlashAttention
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.kv_cache import KV_TYPES
from yarn_edge.runtime.model import Model

# key of a variant -> RopeScaling field, with the flags' own names and types
_SCALING: dict[str, str] = {flag.removeprefix("--"): name for name, flag in FLAGS.items()}
KEYS = ("kv", "backend", *_SCALING)


@dataclass(frozen=True)
class Variant:
    """A file and how to run it. arguments: None for the file's own scaling; overrides: metadata, for this load only."""

    label: str
    gguf: GGUFFile
    kv_type: str = "f16"
    backend: str = "cpu"
    arguments: RuntimeArguments | None = None
    overrides: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file; of a split one the first."""
        return self.gguf.path

    @property
    def weights(self) -> tuple[Any, ...]:
        """Equal for variants that can share a loaded model."""
        return (self.path.resolve(), self.backend, tuple(sorted(self.overrides.items())))

    def load(self) -> Model:
        """The model, on its backend. Raises YarnEdgeError where this machine has none: nothing takes its place."""
        devices = devices_of(self.backend)
        if not devices:
            raise YarnEdgeError(f"{self.label}: {missing(self.backend)}")
        model = Model(self.path, device=devices[0], overrides=self.overrides, gguf=self.gguf)
        if model.gguf.metadata.get(f"{model.gguf.architecture}.attention.causal") is False:
            model.close()
            raise YarnEdgeError(f"{self.label}: is no language model: its tokens see those after them")
        return model

    def context(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int,
        threads: int | None = None,
        flash_attention: FlashAttention = "auto",
    ) -> Context:
        """A context of this variant in a model that `load` gave."""
        return Context(
            model,
            n_ctx=n_ctx,
            n_batch=n_batch,
            kv_type=self.kv_type,
            threads=threads,
            arguments=self.arguments,
            flash_attention=flash_attention,
        )


def parse_variant(text: str, *, kv_type: str = "f16", backend: str = "cpu") -> Variant:
    """`PATH`, `PATH@key=value,key=value`; KEYS are the keys. The others are the defaults. Raises YarnEdgeError."""
    path, wanted = split_variant(text)
    given: dict[str, Any] = {}
    for item in wanted:
        key, _, value = item.partition("=")
        if key not in KEYS:
            raise YarnEdgeError(f"{text}: {key!r} is unknown behind @; known: {', '.join(KEYS)}")
        if key in given:
            raise YarnEdgeError(f"{text}: {key} stands twice")
        given[key] = _VALUES[key](text, value)
    scaling = ScalingOverrides(**{_SCALING[key]: value for key, value in given.items() if key in _SCALING})
    found = Variant(text, read_gguf(path), given.get("kv", kv_type), given.get("backend", backend))
    return scaled(found, from_file(FilePositions(found.gguf), scaling)) if scaling else found


def split_variant(text: str) -> tuple[str, list[str]]:
    """The path and the items behind the last @; a file whose own name holds an @ is taken as it is."""
    path, at, rest = text.rpartition("@")
    if not at or "=" not in rest or Path(text).exists():
        return text, []
    return path, rest.split(",")


def _number(kind: Callable[[str], float]) -> Callable[[str, str], float]:
    def parse(text: str, value: str) -> float:
        try:
            return kind(value)
        except ValueError:
            raise YarnEdgeError(f"{text}: {value!r} is no number") from None

    return parse


def _one_of(names: Mapping[str, Any]) -> Callable[[str, str], str]:
    def parse(text: str, value: str) -> str:
        if value not in names:
            raise YarnEdgeError(f"{text}: {value!r} is unknown; known: {', '.join(names)}")
        return value

    return parse


_VALUES: dict[str, Callable[[str, str], Any]] = {
    "kv": _one_of(KV_TYPES),
    "backend": _one_of(BACKENDS),
    **{key: _number(int if name == "original_context" else float) for key, name in _SCALING.items()},
}


def scaled(variant: Variant, goal: RopeScaling) -> Variant:
    """The variant with `goal` in place of the file's own scaling. Raises YarnEdgeError where arguments cannot do it."""
    arguments, overrides = in_memory(FilePositions(variant.gguf), goal, variant.label)
    return replace(variant, arguments=arguments, overrides=overrides)
