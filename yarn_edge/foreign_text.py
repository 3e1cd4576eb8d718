"""Texts by strangers (names, documents, strings of files, answers of models) made harmless where they are shown.

A terminal obeys control characters: ESC begins commands that overwrite lines, set the title or fill the clipboard, U+0080 to
U+009F are such beginnings in one character, and the overrides of the writing direction show a text otherwise than it reads.
`errors.one_line` is for what must stay on its line.
"""

from __future__ import annotations

import re

_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS = (*range(0x20), *range(0x7F, 0xA0), *_DIRECTIONS)
_HARMLESS: dict[int, str | None] = {
    **dict.fromkeys(_CONTROLS),
    **dict.fromkeys(map(ord, "\u2028\u2029"), "\n"),
    **dict.fromkeys(range(0xD800, 0xE000), "\ufffd"),
}
del _HARMLESS[ord("\n")], _HARMLESS[ord("\t")]
# What json.dumps leaves as it is. Inside a string of JSON each may be written as an escape.
_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_HALVES = re.compile("[\ud800-\udfff]")


def harmless(text: str) -> str:
    """`text` without what a terminal obeys: only its line breaks and tabs stay. Half a character (a surrogate) becomes U+FFFD."""
    return text.translate(_HARMLESS)


def harmless_json(text: str) -> str:
    """The same for a JSON text, whose values stay what they are: json.dumps escapes C0 and quotes, this the others."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def whole_characters(text: str) -> str:
    """`text` that every encoding of Unicode can hold: half a character (a surrogate alone) becomes U+FFFD."""
    return _HALVES.sub("\ufffd", text)
