"""Tokens from the files beside a tokenizer: added_tokens.json, and a pad token that the embedding has no row for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from yarn_edge.checkpoint.config_file import read_json_if_there
from yarn_edge.errors import YarnEdgeError, one_line


def read_added_tokens(checkpoint: Path) -> dict[str, int]:
    """Ids by text from added_tokens.json, {} without that file."""
    file = checkpoint / "added_tokens.json"
    ids = read_json_if_there(file)
    for text, index in ids.items():
        if type(index) is not int or index < 0:
            raise YarnEdgeError(
                f"{file}: {one_line(repr(text), 60)} is {one_line(repr(index), 60)}, expected a token id"
            )
    return ids


def pad_without_row(checkpoint: Path, named: Mapping[str, str | None], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """The id of the pad token by its text, if it is the only token beyond the embedding (config.json: vocab_size); else {}.

    named: the texts of the special tokens by "pad_token", "eos_token" and so on. A model never reads padding, so it runs without
    that token. If another name means the same token, the model does read it.
    """
    pad, others = named.get("pad_token"), [text for name, text in named.items() if name != "pad_token"]
    values = read_json_if_there(checkpoint / "config.json")
    section = values.get("text_config")
    rows = (section if isinstance(section, dict) else values).get("vocab_size")
    if pad is None or pad in others or type(rows) is not int:
        return {}
    return {pad: vocabulary[pad]} if [text for text, index in vocabulary.items() if index >= rows] == [pad] else {}


def left_out_notes(left_out: Mapping[str, int]) -> tuple[str, ...]:
    """What to tell about `pad_without_row`."""
    return tuple(
        f"the pad token {one_line(repr(text), 60)} (id {index}) has no row in the embedding: left out"
        for text, index in left_out.items()
    )
