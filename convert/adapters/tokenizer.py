"""Whose tokenizer a model with adapters has: the one that a trainer saved beside an adapter, else the base's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import note
from yarn_edge.regular_file import digest, is_named, open_regular

_TOKENIZERS = ("tokenizer.json", "tekken.json", "tokenizer.model")
_BESIDE = ("tokenizer_config.json", "chat_template.jinja", "added_tokens.json")


def tokenizer_folder(base: Path, adapters: Sequence[Path]) -> Path:
    """The folder to read the tokenizer and the chat template from. Raises YarnEdgeError if two adapters bring different ones."""
    bring = [folder for folder in adapters if any(is_named(folder / name) for name in _TOKENIZERS)]
    for folder in adapters:
        alone = [name for name in _BESIDE if folder not in bring and is_named(folder / name)]
        if alone:
            note(f"note: {folder} has {', '.join(alone)} but no tokenizer: the base's is used, with its chat template")
    if not bring:
        return base
    contents = {_content(folder): folder for folder in reversed(bring)}
    if len(contents) > 1:
        one, other, *_rest = contents.values()
        raise YarnEdgeError(f"{other} and {one} bring different tokenizers: remove the files of one of them")
    note(f"note: tokenizer and chat template are those of {bring[0]}")
    return bring[0]


def _content(folder: Path) -> str:
    path = next(folder / name for name in _TOKENIZERS if is_named(folder / name))
    with open_regular(path) as file:
        return digest(file)
