"""A user's text from bytes: which encodings are read, and what is not text. The same rules for every command."""

from __future__ import annotations

import codecs
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import read_file_or_pipe

MAX_TEXT_BYTES = 1 << 30

# Byte order mark -> encoding. Without a mark a text is UTF-8.
_MARKS = {codecs.BOM_UTF8: "UTF-8", codecs.BOM_UTF16_LE: "UTF-16-LE", codecs.BOM_UTF16_BE: "UTF-16-BE"}


def decode_text(data: bytes, name: str | Path, *, complete: bool = True) -> str:
    """The text of UTF-8, or of UTF-16 with a byte order mark, without the mark. name: how errors call the text.

    complete: whether these are all its bytes; if not, a character that the last bytes begin is left out. Raises
    YarnEdgeError for bytes of another encoding, and for a NUL, which no text has.
    """
    mark = next((mark for mark in _MARKS if data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data[len(mark) :], final=complete)
    except UnicodeDecodeError as error:
        at, value = len(mark) + error.start, error.object[error.start]
        raise YarnEdgeError(f"{name}: is not {encoding}: byte {at} is {value:#04x}; convert it to UTF-8") from error
    if "\0" in text:
        raise YarnEdgeError(f"{name}: is not text: character {text.index(chr(0))} is a NUL")
    return text


def given_text(text: str, name: str) -> str:
    """A text that was typed. Where the system could not decode its bytes (LC_ALL=C), they are read as UTF-8.

    name: what errors call the text. Raises YarnEdgeError if they are not UTF-8.
    """
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        at = error.start
    else:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            at = len(data[: error.start].decode())
    raise YarnEdgeError(f"{name} is not valid UTF-8 (character {at})")


def read_text(path: Path) -> str:
    """The text of a file or a pipe, without the line break at its end (llama.cpp's --file drops it, too).

    Raises YarnEdgeError for a file that cannot be read, holds no text, or holds something else.
    """
    text = decode_text(read_file_or_pipe(path, MAX_TEXT_BYTES), path)
    if not text.strip():
        raise YarnEdgeError(f"{path}: holds no text")
    return text.removesuffix("\n")
