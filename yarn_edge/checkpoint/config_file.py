"""config.json of a checkpoint and the files beside it, read with errors that name the file and the key."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.adapter import CONFIG, Adapter, adapter_files, described
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import is_named, read_regular

MAX_JSON_BYTES = 100_000_000
MAX_INTEGER = (1 << 31) - 1  # GGUF keys and ggml's sizes are no wider
POINTER = b"version https://git-lfs"

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist, _REPR.maxstring, _REPR.maxlong = 3, 4, 4, 60, 60


def shown(value: Any) -> str:
    """A config value for a message: short and on one line, however large it is."""
    try:
        return one_line(_REPR.repr(value), 80)
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return f"a whole number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__


def is_whole(value: Any) -> bool:
    """Whether a JSON value is a whole number, however it is written: 32768 or 32768.0."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


@dataclass(frozen=True)
class ConfigFile:
    """config.json and the files beside it, as far as positions need them.

    siblings: the names of Python files in the folder. prefix: goes before every key in messages, such as "text_config." for a
    section. params: Mistral's own params.json if the folder has both files; if it is the only one, it takes the place of
    config.json.
    """

    name: str
    values: Mapping[str, Any]
    siblings: frozenset[str] = frozenset()
    prefix: str = ""
    params: ConfigFile | None = None

    @property
    def short(self) -> str:
        """The file's name without its folder, for provenance: that travels with the GGUF."""
        return Path(self.name).name

    def where(self, key: str) -> str:
        """`key` of this file, for provenance."""
        return f"{self.short}: {self.prefix}{key}"

    def error(self, key: str, what: str) -> YarnEdgeError:
        """An error that names this file and `key`."""
        return YarnEdgeError(f"{self.name}: {self.prefix}{key} {what}")

    def section(self, key: str) -> ConfigFile | None:
        """The object under `key` as a config of its own; None if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {shown(value)}, not an object")
        return replace(self, values=value, prefix=f"{self.prefix}{key}.")

    def integer(self, key: str) -> int | None:
        """A whole number from 1 to MAX_INTEGER, also written as 32768.0; None if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not is_whole(value) or value <= 0:
            raise self.error(key, f"is {shown(value)}, expected a whole number above 0")
        if value > MAX_INTEGER:
            raise self.error(key, f"is {shown(value)}, must be from 1 to {MAX_INTEGER}")
        return int(value)

    def boolean(self, key: str) -> bool | None:
        """True or false, also written as 1, 0 or "true"; None if the key is absent or null.

        transformers 4 takes a value as Python does, so any text is true, and transformers 5 refuses the config. What both would
        run is taken. "false" means the opposite of what transformers 4 runs, and is an error.
        """
        value = self.values.get(key)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() == "true":
            return True
        if is_whole(value) and value in (0, 1):
            return bool(value)
        what = f"is {shown(value)}, not true or false"
        if isinstance(value, str) and value.strip().lower() == "false":
            what += ": as a word it says false, but transformers 4 takes any text for true: write it without quotes"
        raise self.error(key, what)

    def required_integer(self, key: str) -> int:
        """A whole number from 1 to MAX_INTEGER; an error if the key is absent."""
        value = self.integer(key)
        if value is None:
            raise self.error(key, f"is {'null' if key in self.values else 'missing'}: add it")
        return value


def refuse_pointer(path: Path, start: bytes) -> None:
    """Refuse a Git LFS pointer left in place of a file. start: the file's first bytes."""
    if start.startswith(POINTER):
        raise YarnEdgeError(f"{path}: is a Git LFS pointer, not the file itself: run git lfs pull in its folder")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises YarnEdgeError that says what is wrong with the file."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        refuse_pointer(path, data)
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: not valid JSON: {one_line(str(error), 120)}") from error
    if not isinstance(value, dict):
        raise YarnEdgeError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if the file does not exist. Raises YarnEdgeError for anything else."""
    return read_json(path) if is_named(path) else {}


def is_mistral_params(values: Mapping[str, Any]) -> bool:
    """Whether a params.json is Mistral's. Meta's files of that name have neither a yarn block nor head_dim."""
    return "yarn" in values or ("dim" in values and "head_dim" in values)


def read_config(folder: Path) -> ConfigFile:
    """config.json of a checkpoint folder, or Mistral's params.json if that is the only one."""
    if not folder.is_dir():
        what = "is a file, expected a checkpoint folder" if folder.exists() else "no such checkpoint folder"
        raise YarnEdgeError(f"{folder}: {what}")
    path, params_path = folder / "config.json", folder / "params.json"
    siblings = frozenset(p.name for p in folder.glob("*.py"))
    params = None
    if is_named(params_path):
        values = read_json(params_path)
        params = ConfigFile(str(params_path), values, siblings) if is_mistral_params(values) else None
    if is_named(path):
        return ConfigFile(str(path), read_json(path), siblings, params=params)
    if params is None:
        raise _no_config(folder)
    return params


def _no_config(folder: Path) -> YarnEdgeError:
    """The error for a folder without config.json, which says what the folder holds instead."""
    adapter = find_adapter(folder)
    if adapter is not None:
        return YarnEdgeError(
            f"{folder}: holds {adapter.what} ({', '.join(adapter.files)}) and no model (no config.json): {adapter.remedy}"
        )
    places = (f"{depth}/{name}" for depth in ("*", "snapshots/*") for name in ("config.json", CONFIG))
    inner = dict.fromkeys(
        str(path.parent.relative_to(folder)) for place in places for path in sorted(folder.glob(place))
    )
    hint = f"; there is one in {one_line(', '.join(inner), 100)}: pass such a folder" if inner else ""
    return YarnEdgeError(f"{folder}: has no config.json, so it is not a Hugging Face checkpoint{hint}")


def find_adapter(folder: Path) -> Adapter | None:
    """The adapter whose files lie in a folder, beside weights or alone; None if there is none."""
    files = adapter_files(folder)
    return described(files, read_json(folder / CONFIG) if CONFIG in files else {}) if files else None


def refuse_adapter(folder: Path) -> None:
    """Raise YarnEdgeError if an adapter lies beside the weights of a folder: without it they are another model."""
    adapter = find_adapter(folder)
    if adapter is not None:
        raise YarnEdgeError(
            f"{folder}: holds {adapter.what} ({', '.join(adapter.files)}), which would be left out: {adapter.remedy}; or remove "
            "these files to convert the weights without it"
        )
