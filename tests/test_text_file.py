"""A user's text: encodings, marks, cuts in the middle of a character, and what is not text."""

from __future__ import annotations

from pathlib import Path

import pytest

from yarn_edge.errors import YarnEdgeError
from yarn_edge.text_file import decode_text, read_text

TEXT = "Zoë 🎈 ende\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str) -> None:
    assert decode_text(TEXT.encode(encoding), "x") == TEXT


def test_utf16_of_the_other_byte_order() -> None:
    assert decode_text(b"\xfe\xff" + TEXT.encode("utf-16-be"), "x") == TEXT


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_cut_gives_the_characters_before_it(encoding: str) -> None:
    data = TEXT.encode(encoding)
    lengths = [len(decode_text(data[:n], "x", complete=False)) for n in range(4, len(data) + 1)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == len(TEXT)
    assert all(decode_text(data[:n], "x", complete=False) == TEXT[:k] for n, k in enumerate(lengths, 4))


BAD = {
    "Latin-1": (b"caf\xe9", "x: is not UTF-8: byte 3 is 0xe9"),
    "after a mark": (b"\xef\xbb\xbfcaf\xe9 x", "x: is not UTF-8: byte 6 is 0xe9"),
    "cut in a character": ("ü".encode()[:1], "x: is not UTF-8: byte 0 is 0xc3"),
    "half of UTF-16": (b"\xff\xfeab\xd8", "x: is not UTF-16-LE: byte 4 is 0xd8"),
    "binary": (b"abc\0def", "x: is not text: character 3 is a NUL"),
}


@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD)
def test_what_is_not_text(data: bytes, message: str) -> None:
    with pytest.raises(YarnEdgeError, match=message):
        decode_text(data, "x")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "text"
    with pytest.raises(YarnEdgeError, match="text: No such file"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf \n\n")
    with pytest.raises(YarnEdgeError, match="text: holds no text"):
        read_text(path)
    path.write_bytes("é\n\n".encode())
    assert read_text(path) == "é\n"
