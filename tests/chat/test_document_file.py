"""Documents from files: text in several encodings, PDF, and files that are neither."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from yarn_edge.chat.documents import MAX_BYTES, read_document
from yarn_edge.errors import YarnEdgeError


def pdf(*pages: str) -> bytes:
    """A PDF with a line of text on each page, by hand (ISO 32000-1, 7.5)."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", ""]
    kids = []
    for text in pages:
        stream = zlib.compress(f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode("latin-1"))
        number = len(objects) + 1
        kids.append(f"{number} 0 R")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>"
        )
        head = f"<< /Length {len(stream)} /Filter /FlateDecode >>\nstream\n"
        objects.append(head + stream.decode("latin-1") + "\nendstream")
    objects[1] = f"<< /Type /Pages /Kids [{' '.join(kids)}] /Count {len(kids)} >>"
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    tail = f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + tail.encode()


TEXTS = {
    "UTF-8": ("Zoë said\nso.\n".encode(), "Zoë said\nso.\n"),
    "with a mark": (b"\xef\xbb\xbfabc", "abc"),
    "UTF-16": ("Zoë".encode("utf-16"), "Zoë"),
    "Windows lines": (b"a\r\nb\r\n", "a\nb\n"),
}


@pytest.mark.parametrize("data, text", TEXTS.values(), ids=TEXTS)
def test_text(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes(data)
    found = read_document(path)
    assert (found.name, found.text) == ("a.md", text)


def test_a_pdf(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    path = tmp_path / "two pages.txt"  # its first bytes decide what it is, not its name
    path.write_bytes(pdf("The first page", "and the second"))
    assert read_document(path).text == "The first page\n\nand the second"


BAD = {
    "Latin-1": (b"caf\xe9", "is not UTF-8: byte 3 is 0xe9"),
    "binary": (b"abc\0def", "is not text: character 3 is a NUL"),
    "half of UTF-16": (b"\xff\xfeab\xd8", "is not UTF-16-LE: byte 4 is 0xd8"),
    "empty": (b"", "has no text"),
    "space": (b" \n\t", "has no text"),
    "a damaged PDF": (b"%PDF-1.7\nnonsense", "pypdf cannot read it"),
    "a PDF without text": (pdf(""), "has no text"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("data, message", BAD.values(), ids=BAD)
def test_what_is_no_text(data: bytes, message: str, tmp_path: Path) -> None:
    if b"%PDF" in data:
        pytest.importorskip("pypdf")
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    with pytest.raises(YarnEdgeError, match=message):
        read_document(path)


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(YarnEdgeError, match="No such file"):
        read_document(tmp_path / "none")
    with pytest.raises(YarnEdgeError, match="is not a regular file but a folder"):
        read_document(tmp_path)
    big = tmp_path / "big.txt"
    with big.open("wb") as file:
        os.truncate(file.fileno(), MAX_BYTES + 1)
    monkeypatch.setattr("yarn_edge.chat.documents.MAX_BYTES", 1000)
    with pytest.raises(YarnEdgeError, match="is larger than"):
        read_document(big)
