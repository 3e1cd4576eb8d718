"""Tokens that have no row in the embedding: which they are, and which file of the checkpoint brings them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from yarn_edge.checkpoint.config_file import read_json_if_there
from yarn_edge.checkpoint.tokenizer import special_texts, token_text, tokenizer_config
from yarn_edge.errors import YarnEdgeError, one_line


def check_token_rows(source: Path, vocabulary: Mapping[str, int], n_rows: int) -> None:
    """Raise YarnEdgeError if a token has no row in the embedding. source: tokenizer.json or tokenizer.model."""
    rowless = sorted((index, text) for text, index in vocabulary.items() if index >= n_rows)
    if not rowless:
        return
    index, text = rowless[0]
    name = f"{one_line(repr(text), 60)} (id {index})"
    place = origin(source.parent, text)
    if place is None:
        raise YarnEdgeError(
            f"{source}: has {max(vocabulary.values()) + 1} tokens, but the embedding has {n_rows} rows, and {name} is the first "
            "without one: the tokenizer belongs to another model"
        )
    file, key = place
    more = f", nor have {len(rowless) - 1} more" if len(rowless) > 1 else ""
    raise YarnEdgeError(
        f"{source.parent / file}: {key and key + ' '}brings the token {name}, which has no row in the embedding of {n_rows} rows"
        f"{more}: add rows (model.resize_token_embeddings({rowless[-1][0] + 1})) and train them, or remove the token"
    )


def origin(folder: Path, text: str) -> tuple[str, str] | None:
    """(file, its key or "") that adds a token to the tokenizer's own vocabulary; None if it belongs to that vocabulary."""
    own = read_json_if_there(folder / "tokenizer.json")
    model = own.get("model")
    if isinstance(model, dict) and text in (model.get("vocab") or ()):
        return None
    if any(isinstance(token, dict) and token.get("content") == text for token in own.get("added_tokens") or ()):
        return "tokenizer.json", "added_tokens"
    if text in read_json_if_there(folder / "added_tokens.json"):
        return "added_tokens.json", ""
    config = tokenizer_config(folder)
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        if token_text(token) == text:
            return "tokenizer_config.json", f"added_tokens_decoder.{key}"
    files = [name for name in ("tokenizer_config.json", "special_tokens_map.json") if (folder / name).exists()]
    for file in files:
        values = read_json_if_there(folder / file)
        for key, value in values.items():
            if text in special_texts({key: value}):
                return file, one_line(key, 60)
    return None
