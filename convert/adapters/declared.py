"""adapter_config.json against the adapter's tensors: what it declares is in the file, and what is in the file is not ruled out.

Which modules a name means is PEFT's rule (check_target_module_exists in peft/tuners/tuners_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from yarn_edge.checkpoint.config_file import shown
from yarn_edge.errors import YarnEdgeError, one_line

from .changes import VOCABULARY
from .parts import MAGNITUDE, TOKENS, AdapterParts, B

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
_STACKED = ".experts."  # transformers keeps experts as one parameter, which a module's name does not reach
_ABSENT = "and nothing of it is in the adapter's file: save the adapter again, or correct the config"
_ALL_LINEAR = "all-linear"


def check_declared(parts: AdapterParts, base: Collection[str], tied: bool) -> None:
    """Raise YarnEdgeError, with the field and the module, for the first contradiction. base: names of the base's tensors.

    tied: whether embeddings and head are one matrix, which is then saved for one of them.
    """
    _check_lengths(parts)
    _check_ruled_out(parts)
    modules = {name.rpartition(".")[0] for name in base if name.endswith(".weight") and _STACKED not in name}
    pairs = {module for module, found in parts.modules.items() if found.one_of(B) is not None}
    trained = {module for module, found in parts.modules.items() if TOKENS in found.tensors}
    wanted = {module for module in modules if not (_is_excluded(parts, module) or _to_save(parts, module))}
    targets = [name for name in _names(parts, "target_modules") if name != _ALL_LINEAR]
    for key, names, of_base, there, means in (
        ("target_modules", targets, wanted, pairs, _ends_with),
        ("modules_to_save", _names(parts, "modules_to_save"), base, parts.whole, _contains),
        ("trainable_token_indices", [*parts.config.tokens], modules, trained, _ends_with),
    ):
        _check_there(parts, key, names, _tied_alike(of_base, there, tied), means)
    _check_biases(parts, base, pairs)


def all_linear_notes(parts: AdapterParts, base: Iterable[str]) -> Iterator[str]:
    """A note if the config says all-linear and the file has less. base: names of the base's tensors."""
    if parts.config.file.values.get("target_modules") != _ALL_LINEAR:
        return
    endings: dict[str, bool] = {}
    for name in base:
        module = name.removesuffix(".weight")
        ending = module.rpartition(".")[2]
        if ending.endswith("_proj") and name.endswith(".weight") and _STACKED not in name:
            endings[ending] = endings.get(ending, False) or module in parts.modules
    absent = [ending for ending, there in endings.items() if not there]
    if absent:
        yield (
            f"note: {parts.config.file.name}: target_modules is {_ALL_LINEAR}, and the file has nothing for "
            f"{one_line(', '.join(sorted(absent)), 100)}"
        )


def _names(parts: AdapterParts, key: str) -> list[str]:
    """A list of names in the config. A text is a regular expression, which names no module."""
    value = parts.config.file.values.get(key)
    return [name for name in value if isinstance(name, str) and name] if isinstance(value, list) else []


def _ends_with(module: str, name: str) -> bool:
    return f".{module}".endswith(f".{name}")


def _contains(tensor: str, name: str) -> bool:
    return f".{name}." in f".{tensor}"


def _is_excluded(parts: AdapterParts, module: str) -> bool:
    return any(_ends_with(module, name) for name in _names(parts, "exclude_modules"))


def _to_save(parts: AdapterParts, module: str) -> bool:
    return any(_contains(f"{module}.", name) for name in _names(parts, "modules_to_save"))


def _tied_alike(of_base: Collection[str], there: Collection[str], tied: bool) -> dict[str, bool]:
    """Of each module or tensor of the base, whether the adapter has it."""
    found = {name: name in there for name in of_base}
    both = [name for name in found if name in VOCABULARY or f"{name}.weight" in VOCABULARY]
    if tied and any(found[name] for name in both):
        found |= dict.fromkeys(both, True)
    return found


def _check_there(
    parts: AdapterParts, key: str, names: Iterable[str], found: dict[str, bool], means: Callable[[str, str], bool]
) -> None:
    """Every name that means something of the base has something in the file."""
    for name in names:
        meant = [there for module, there in found.items() if means(module, name)]
        if meant and not any(meant):
            raise parts.config.file.error(key, f"names {one_line(name, 100)}, {_ABSENT}")


def _check_lengths(parts: AdapterParts) -> None:
    """DoRA's lengths are there for every pair, or for none."""
    for module, found in parts.modules.items():
        has = MAGNITUDE in found.tensors
        if found.one_of(B) is None or has == parts.config.dora:
            continue
        name = one_line(module, 100)
        if has:
            what = f"is absent or false, but the file has {MAGNITUDE} of {name}: set it to true if the adapter is DoRA"
        else:
            what = f"is true, but the file has no {MAGNITUDE} of {name}: save the adapter again"
        raise parts.config.file.error("use_dora", what)


def _check_ruled_out(parts: AdapterParts) -> None:
    """No pair is of a layer or module that the config leaves out."""
    values = parts.config.file.values
    layers: Any = values.get("layers_to_transform")
    chosen = layers if isinstance(layers, list) else [] if layers is None else [layers]
    for module, found in parts.modules.items():
        if found.one_of(B) is None:
            continue
        layer = _LAYER.search(module)
        if chosen and layer and int(layer[1]) not in chosen and not isinstance(values.get("target_modules"), str):
            raise _ruled_out(parts, "layers_to_transform", module)
        if _is_excluded(parts, module):
            raise _ruled_out(parts, "exclude_modules", module)


def _ruled_out(parts: AdapterParts, key: str, module: str) -> YarnEdgeError:
    return parts.config.file.error(
        key,
        f"is {shown(parts.config.file.values[key])}, but the file has a pair of {one_line(module, 100)}: correct the config, or save "
        "the adapter again",
    )


def _check_biases(parts: AdapterParts, base: Collection[str], pairs: Iterable[str]) -> None:
    """`bias` says which of the base's were trained: at least one of them is there."""
    kind = parts.config.file.values.get("bias")
    ours = [f"{module}.bias" for module in pairs] if kind == "lora_only" else base if kind == "all" else []
    wanted = [name for name in ours if name.endswith(".bias") and name in base]
    if wanted and not any(name in parts.whole for name in wanted):
        raise parts.config.file.error("bias", f"is {kind}, which means {one_line(wanted[0], 100)}, {_ABSENT}")
