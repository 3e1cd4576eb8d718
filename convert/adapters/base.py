"""The base of an adapter by the name in its config: a folder, or a model in the Hub's cache on this disk. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

from yarn_edge.checkpoint.adapter_config import LoraConfig, read_lora_config
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.hub.reference import HubReference
from yarn_edge.hub.repository import cached_snapshot, hub_cache
from yarn_edge.progress import note

from .requests import AdaptedCheckpoint

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,200}")


def named_base(config: LoraConfig) -> Path:
    """The folder of the base that an adapter names. Raises YarnEdgeError if it is not on this disk."""
    name, remedy = config.base, "pass the folder of the base before --adapter"
    if not name:
        raise config.file.error("base_model_name_or_path", f"is missing: {remedy}")
    beside = Path(config.file.name).parent / name
    for folder in (Path(name).expanduser(), beside):
        if (folder / "config.json").is_file():
            return folder
    if not _NAME.fullmatch(name):
        raise config.file.error(
            "base_model_name_or_path", f"is {one_line(repr(name), 100)}, which is not here: {remedy}"
        )
    found = _snapshot(name, config.revision or "main")
    if found is None:
        raise config.file.error(
            "base_model_name_or_path",
            f"is {one_line(repr(name), 100)}, which is neither a folder here nor in {hub_cache()}: {remedy}",
        )
    return found


def _snapshot(name: str, revision: str) -> Path | None:
    """The folder of a model's revision in the Hub's cache; None if it is not there."""
    if not _REVISION.fullmatch(revision) or ".." in revision:
        return None
    folder = cached_snapshot(HubReference(name, revision))
    return folder if folder is not None and (folder / "config.json").is_file() else None


def same_model(base: Path, config: LoraConfig) -> bool:
    """Whether a folder could be the base that an adapter names, by their names."""
    given = base.absolute()
    names = {given.name.lower(), given.resolve().name.lower()}
    if given.parent.name == "snapshots":
        names.add(given.parent.parent.name.split("--")[-1].lower())
    return Path(config.base).name.lower() in names


def base_of(asked: AdaptedCheckpoint) -> Path:
    """The folder of the base: the given one, or, with a note, the one that the first adapter names."""
    if asked.base is not None:
        return Path(asked.base)
    if not asked.adapters:
        raise YarnEdgeError(
            "the checkpoint is missing: pass its folder, or --adapter DIR for the base that an adapter names"
        )
    config = read_lora_config(asked.adapters[0].folder)
    folder = named_base(config)
    note(f"the base is {folder}, as {config.file.name} says")
    return folder
