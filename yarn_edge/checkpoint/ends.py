"""Where answers end, by the files of a checkpoint: one reading for `convert`, which writes it, and `verify`, which compares.

transformers stops at eos_token_id of generation_config.json, one id or a list, and at config.json's if there is none; programs
that know only the tokenizer stop at its EOS. An answer may end at any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from yarn_edge.checkpoint.config_file import ConfigFile, read_json_if_there, shown
from yarn_edge.checkpoint.tokenizer import Reference

_KEY = "eos_token_id"
_SECTIONS = ("decoder", "generator", "text_config")  # transformers: GenerationConfig.from_model_config


def end_ids(checkpoint: Path, reference: Reference, n_tokens: int) -> tuple[int, ...]:
    """The ids at which an answer ends, each once, the tokenizer's EOS first; () if no file names one.

    n_tokens: rows of the embedding. Raises YarnEdgeError, with the file and the key, for anything but ids below it. -1 means none.
    """
    own = [reference.ids["eos"]] if "eos" in reference.ids else []
    listed = (_ids(config, n_tokens) for config in _configs(checkpoint))
    return tuple(dict.fromkeys([*own, *next(filter(None, listed), ())]))


def _configs(checkpoint: Path) -> Iterator[ConfigFile]:
    """Where transformers looks, in its order."""
    generation, config = (
        ConfigFile(str(path), read_json_if_there(path))
        for path in (checkpoint / "generation_config.json", checkpoint / "config.json")
    )
    yield from (generation, config)
    yield from filter(None, (config.section(name) for name in _SECTIONS))


def _ids(config: ConfigFile, n_tokens: int) -> list[int]:
    value = config.values.get(_KEY)
    if value is None or (type(value) is int and value == -1):
        return []
    ids = value if isinstance(value, list) else [value]
    for index in ids:
        if type(index) is not int or not 0 <= index < n_tokens:
            what = f"is {shown(value)}" if index is value else f"holds {shown(index)}"
            raise config.error(
                _KEY, f"{what}, expected an id from 0 to {n_tokens - 1} or a list of them: correct or remove it"
            )
    return ids
