"""What users should know about an adapter before it is merged: that it changes nothing, that it was trained on another base, and
that rope scaling is in none of its files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import Positions, read_positions
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.regular_file import is_named, read_regular

from .base import same_model
from .changes import Changes
from .parts import TOKENS, AdapterParts

_MAX_TEXT = 4 << 20
# Where trainers leave their arguments beside an adapter: LLaMA-Factory, axolotl (its YAML is in the model card), others.
_ARGUMENTS = ("*.yaml", "*.yml", "README.md", "training_args.json", "trainer_config.json")
_SCALED = re.compile(
    r"^[\s\"'-]*(rope_scaling|rope_parameters|rope_type|yarn_factor|extended_context)[\"']?\s*[:=]\s*(\S.*)?$", re.M
)
_NOTHING = ("", "null", "none", "default", "~")


def notes_about(adapters: Sequence[AdapterParts], changes: Changes, base: Path) -> Iterator[str]:
    """Notes on what the adapters change, and on which base."""
    for parts in adapters:
        config, folder = parts.config, parts.request.folder
        if config.base and not same_model(base, config):
            yield (
                f"note: {folder} was trained on {one_line(config.base, 100)}, and is put on {base}: if that is another model, the "
                "result is, too"
            )
        if config.fan_in_fan_out:
            yield f"note: {config.file.name}: fan_in_fan_out is left aside, as peft does for these layers"
        if _changes_nothing(parts):
            yield f"warning: {folder} changes nothing: {'its weight is 0' if not parts.request.weight else 'its products are 0'}"
    if not changes:
        yield "warning: all that the adapters bring is what the base already has"


def _changes_nothing(parts: AdapterParts) -> bool:
    """Whether all products are zero (as LoRA starts) and nothing else is changed."""
    if parts.whole or any(TOKENS in module.tensors for module in parts.modules.values()):
        return False
    return not parts.request.weight or all(
        any(not tensor.float32().any() for tensor in module.tensors.values()) for module in parts.modules.values()
    )


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
