"""The tensors of an adapter's files, by the module that each belongs to. Names as PEFT, Unsloth and LLaMA-Factory write them.

With or without the adapter's name inside (`lora_A.default.weight`), with what wrappers put around them
(`yarn_edge.checkpoint.tensor_names`). Values are read when they are needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yarn_edge.checkpoint.adapter import adapter_files
from yarn_edge.checkpoint.adapter_config import LoraConfig, read_lora_config
from yarn_edge.checkpoint.tensor_names import canonical_names
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note
from yarn_edge.regular_file import is_named
from yarn_edge.source_file import SourceFile

from ..checkpoint import read_safetensors, read_torch
from ..stored import DTYPES, Tensor
from .requests import AdapterRequest

# PEFT's own file, in its order; and what LongLoRA and others save beside it: whole tensors that were trained, too.
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_BESIDE = ("trainable_params.bin", "non_lora_trainables.bin")
_PEFT_FRONT = re.compile(r"^(?:.*?\.)?base_model\.model\.")
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector|"
    r"token_adapter\.trainable_tokens_delta|modules_to_save|original_module|base_layer)(?P<rest>(?:\.[^.]+)*)$"
)
_VALUE = re.compile(r"(?:\.[^.]+)?(?:\.weight)?")  # after a part's name: the adapter's name, "weight", both, nothing
_BIAS = re.compile(r"(?:\.[^.]+)?\.bias")
A, B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
MAGNITUDE, BIAS, TOKENS = "lora_magnitude_vector", "lora_B.bias", "token_adapter.trainable_tokens_delta"


@dataclass
class ModuleParts:
    """What an adapter has for one module. name: in the model, for the config's patterns. tensors: by what they are (A, B, …)."""

    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def one_of(self, names: tuple[str, ...]) -> Tensor | None:
        """The tensor under whichever of two names it is there."""
        return next((self.tensors[name] for name in names if name in self.tensors), None)


@dataclass
class AdapterParts:
    """An adapter. modules: by the canonical name of the module. whole: tensors in place of the base's, by their names there.

    shared: those of `whole` that were the base's own (`base_layer`), which tied weights share. originals: what the base had when
    the adapter was trained. files: stay open.
    """

    request: AdapterRequest
    config: LoraConfig
    files: tuple[SourceFile, ...]
    modules: dict[str, ModuleParts] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    shared: set[str] = field(default_factory=set)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def error(self, tensor: str, what: str) -> YarnEdgeError:
        """An error that names the adapter's folder and one of its tensors."""
        return YarnEdgeError(f"{self.request.folder}: tensor {one_line(tensor, 120)} {what}")


def read_parts(
    request: AdapterRequest, known: Callable[[str], str | None], in_base: Mapping[str, Tensor]
) -> AdapterParts:
    """The tensors of an adapter, from the headers of its files.

    known: the name in the language model of a canonical name, None for parts of the model that are left out. in_base: the
    base's tensors. Raises YarnEdgeError for tensors that are not understood.
    """
    config = read_lora_config(request.folder)
    files = tuple(SourceFile(path) for path in _weight_files(request.folder))
    parts = AdapterParts(request, config, files)
    for file in files:
        read = read_safetensors if file.path.suffix == ".safetensors" else read_torch
        saved = read(file)
        names, _wrapper = canonical_names(str(file.path), saved)
        for canonical, name in names.items():
            tensor = saved[name]
            if tensor.dtype not in DTYPES:
                raise parts.error(name, f"has dtype {one_line(tensor.dtype, 20)}; supported: {', '.join(DTYPES)}")
            inside = known(canonical)
            if inside is not None:
                _take(parts, inside, tensor, in_base)
    if not parts.modules and not parts.whole:
        raise YarnEdgeError(f"{request.folder}: the adapter has no tensors for the language model")
    return parts


def _weight_files(folder: Path) -> Iterator[Path]:
    main = next((folder / name for name in _FILES if is_named(folder / name)), None)
    if main is None:
        there = one_line(", ".join(adapter_files(folder)), 100)
        raise YarnEdgeError(
            f"{folder}: has no {' and no '.join(_FILES)}, only {there}: save the adapter with save_pretrained"
        )
    for name in adapter_files(folder):
        if not name.startswith("adapter_model") or name == main.name:
            continue
        if name not in _FILES:
            raise YarnEdgeError(
                f"{folder}: has {one_line(name, 100)} beside {main.name}, which alone would be read: save the adapter in one file, or "
                "remove what does not belong to it"
            )
        note(f"note: {folder}: {name} is left out, as peft does: {main.name} is beside it")
    yield main
    yield from (folder / name for name in _BESIDE if is_named(folder / name))


def _take(parts: AdapterParts, name: str, tensor: Tensor, in_base: Mapping[str, Tensor]) -> None:
    """File one tensor under what it is. name: canonical."""
    match = _PART.match(name)
    if match is None:
        _put(parts, parts.whole, name, tensor)
        return
    module, part, rest = match["module"], match["part"], match["rest"]
    if part in ("modules_to_save", "original_module", "base_layer"):
        target = module + rest
        if part == "modules_to_save" and target not in in_base:
            target = f"{module}.{rest[1:].partition('.')[2]}"  # without the adapter's name
        _put(parts, parts.originals if part == "original_module" else parts.whole, target, tensor)
        if part == "base_layer" and target.endswith(".weight"):
            parts.shared.add(target)
        return
    if part == "lora_B" and _BIAS.fullmatch(rest):
        part = BIAS
    elif not _VALUE.fullmatch(rest):
        raise parts.error(tensor.name, "is unknown: it is none that peft's LoRA has")
    short = not _PEFT_FRONT.sub("", tensor.name).startswith("model.")  # trained without its head: AutoModel
    known = parts.modules.setdefault(module, ModuleParts(module.removeprefix("model.") if short else module))
    _put(parts, known.tensors, part, tensor)


def _put(parts: AdapterParts, into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in into:
        raise parts.error(
            tensor.name,
            f"and {one_line(into[name].name, 120)} are the same: the folder holds several adapters: keep one",
        )
    into[name] = tensor
