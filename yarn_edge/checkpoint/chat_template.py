"""A checkpoint's chat template, from any of the files that transformers reads it from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.config_file import read_json_if_there
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import is_named, read_regular

MAX_TEMPLATE_BYTES = 16 << 20
_TEMPLATES = "additional_chat_templates"  # transformers 5 writes those that are not the default there


def chat_template(checkpoint: Path, config: Mapping[str, Any]) -> str | None:
    """The text of the chat template, or of the one named "default" among several, as transformers chooses it; None for none.

    Read from chat_template.jinja and the folder additional_chat_templates, else from tokenizer_config.json (`config`), else from
    chat_template.json. Raises YarnEdgeError if none of several templates is the default, and for anything that is not text.
    """
    files = {path.stem: _read_text(path) for path in sorted(checkpoint.glob(f"{_TEMPLATES}/*.jinja"))}
    if is_named(alone := checkpoint / "chat_template.jinja"):
        files = {"default": _read_text(alone), **files}
    others = checkpoint / "chat_template.json"
    further: dict[str, Path] = {}
    for source, given in (
        (checkpoint / _TEMPLATES, files),
        (checkpoint / "tokenizer_config.json", config.get("chat_template")),
        (others, read_json_if_there(others).get("chat_template")),
    ):
        named = _named_templates(source, given)
        if "default" in named:
            return named["default"]
        further |= dict.fromkeys(named, source)
    if further:
        source = next(iter(further.values()))
        names = one_line(", ".join(map(repr, further)), 200)
        raise YarnEdgeError(
            f"{source}: of its chat templates {names} none is named 'default', so none is the one to use: give that name to one "
            "of them, or remove them to convert without a chat template"
        )
    return None


def _named_templates(source: Path, given: object) -> dict[str, str]:
    """Templates by name; a single one is the default."""
    if given is None:
        return {}
    if isinstance(given, list):
        pairs = [(t.get("name"), t.get("template")) if isinstance(t, dict) else (None, t) for t in given]
    else:
        pairs = list(given.items()) if isinstance(given, dict) else [("default", given)]
    named: dict[str, str] = {}
    for name, template in pairs:
        if not isinstance(template, str) or not isinstance(name, str):
            kind = type(template if isinstance(name, str) else name).__name__
            raise YarnEdgeError(f"{source}: chat_template is a {kind}, not text: correct or remove it")
        try:
            template.encode()
        except UnicodeEncodeError as error:
            raise YarnEdgeError(
                f"{source}: chat_template has half a character (a lone surrogate) at position {error.start}: correct it"
            ) from error
        if named.setdefault(name, template) != template:
            raise YarnEdgeError(
                f"{source}: two chat templates are named {one_line(repr(name), 60)}: remove one of them"
            )
    return named


def _read_text(path: Path) -> str:
    try:
        return read_regular(path, MAX_TEMPLATE_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise YarnEdgeError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
