"""What users should know about an adapter: that it changes nothing, that it was trained on another base, that rope scaling is in
none of its files, and what of it was merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from yarn_edge.checkpoint.adapter import model_name
from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import Positions, read_positions
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.regular_file import is_named, read_regular

from .base import same_model
from .changes import Changes
from .declared import all_linear_notes
from .parts import MAGNITUDE, TOKENS, AdapterParts, B

_MAX_TEXT = 4 << 20
# Where trainers leave their arguments beside an adapter: LLaMA-Factory, axolotl (its YAML is in the model card), others.
_ARGUMENTS = ("*.yaml", "*.yml", "README.md", "training_args.json", "trainer_config.json")
_SCALED = re.compile(
    r"^[\s\"'-]*(rope_scaling|rope_parameters|rope_type|yarn_factor|extended_context)[\"']?\s*[:=]\s*(\S.*)?$", re.M
)
_NOTHING = ("", "null", "none", "default", "~")


def notes_about(
    adapters: Sequence[AdapterParts], changes: Changes, base: Path, base_names: Iterable[str]
) -> Iterator[str]:
    """Notes on what the adapters change, and on which base."""
    folders = [parts.request.folder.resolve() for parts in adapters]
    for folder in dict.fromkeys(folder for folder in folders if folders.count(folder) > 1):
        yield f"note: {folder} is given {folders.count(folder)} times, and is added as often"
    for parts in adapters:
        config, folder = parts.config, parts.request.folder
        yield from all_linear_notes(parts, base_names)
        if config.base and not same_model(base, config):
            yield (
                f"note: {folder} was trained on {one_line(config.base, 100)}, and is put on {base}: if that is another model, the "
                "result is, too"
            )
        if config.fan_in_fan_out:
            yield f"note: {config.file.name}: fan_in_fan_out is left aside, as peft does for these layers"
        why = _why_nothing(parts)
        if why:
            yield f"warning: {folder} changes nothing: its {why} 0"
    if not changes:
        yield "warning: all that the adapters bring is what the base already has"


def _why_nothing(parts: AdapterParts) -> str:
    """What is 0, if nothing is changed: the weight, alpha, or all products (as LoRA starts); else ""."""
    modules = parts.modules.values()
    if parts.whole or any(TOKENS in module.tensors for module in modules):
        return ""
    if not parts.request.weight:
        return "weight is"
    if not any(MAGNITUDE in module.tensors or parts.config.scale_of(module.name)[1] for module in modules):
        return "alpha is"
    zero = all(any(not tensor.float32().any() for tensor in module.tensors.values()) for module in modules)
    return "products are" if zero else ""


def merged_lines(adapters: Sequence[AdapterParts]) -> Iterator[str]:
    """What was merged, a line for each adapter."""
    for parts in adapters:
        config = parts.config
        pairs = [found for found in parts.modules.values() if found.one_of(B) is not None]
        words = [_counted(len(pairs), "module"), f"r {config.rank}", f"alpha {config.alpha:g}"]
        words += ["rsLoRA"] if config.rslora else []
        words += ["DoRA"] if config.dora else []
        words += [_counted(len(parts.whole), "whole tensor")] if parts.whole else []
        yield f"merged {model_name(parts.request.folder)}: {', '.join(words)}, weight {parts.request.weight:g}"


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def scaling_notes(folders: Sequence[Path], positions: Positions, given: bool) -> Iterator[str]:
    """Notes on positions: an adapter has none, but what lies beside it may tell of some. given: whether flags state the scaling."""
    told = given
    for folder in folders:
        for text in (*_in_config(folder, positions), *(() if _scaled(positions) else _in_arguments(folder))):
            if not given:
                told = True
                yield f"warning: {text}: if the adapter was trained so, pass --yarn-factor and --yarn-orig-ctx (or put it into config.json)"
    if not told and not _scaled(positions):
        yield (
            "note: an adapter has no rope scaling of its own, and its base has none: if it was trained with one, pass --yarn-factor "
            "and --yarn-orig-ctx"
        )


def _scaled(positions: Positions) -> bool:
    return any(scaling.method != "none" for scaling in positions.parts.values())


def _in_config(folder: Path, positions: Positions) -> Iterator[str]:
    """A config.json that a trainer left beside the adapter, if it says other positions than the base's."""
    if not is_named(folder / "config.json"):
        return
    try:
        theirs = read_positions(read_config(folder))
    except YarnEdgeError as error:
        yield f"{folder / 'config.json'} cannot be compared with the base's ({error})"
        return
    one, other = positions.parts, theirs.parts
    if one.keys() != other.keys() or any(_differ(one[key], other[key]) for key in one):
        yield f"{folder / 'config.json'} says other positions than the base ({_words(theirs)}; the base: {_words(positions)})"


def _differ(one: RopeScaling, other: RopeScaling) -> bool:
    return bool(one.differences(other)) or one.extended_context != other.extended_context


def _words(positions: Positions) -> str:
    return ", ".join(
        f"{s.method} factor {s.factor:g} to {s.extended_context}"
        if s.method != "none"
        else f"none, {s.extended_context}"
        for s in positions.parts.values()
    )


def _in_arguments(folder: Path) -> Iterator[str]:
    """Lines of a trainer's arguments that name a scaling, the first of each file."""
    for pattern in _ARGUMENTS:
        for path in sorted(folder.glob(pattern)):
            try:
                text = read_regular(path, _MAX_TEXT).decode("utf-8", "replace")
            except YarnEdgeError:
                continue
            for match in _SCALED.finditer(text):
                value = (match[2] or "").strip().strip("\"',")
                if match[2] is None or value.lower() not in _NOTHING:
                    yield f"{path} has {one_line(match[0].strip(), 80)!r}, and the base has no scaling"
                    break
