"""Reads a document from a file: text in UTF-8 (or UTF-16 with a byte order mark), or a PDF with the extra `yarn-edge[pdf]`."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import BinaryIO

from yarn_edge.chat.conversation import Document
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.foreign_text import whole_characters
from yarn_edge.progress import bar
from yarn_edge.regular_file import read_file_or_pipe
from yarn_edge.text_file import decode_text

MAX_BYTES = 256 << 20
_PDF = b"%PDF-"


def read_document(path: Path) -> Document:
    """The text of a file. Raises YarnEdgeError if it is not text, is empty, or cannot be read."""
    data = read_file_or_pipe(path, MAX_BYTES)
    text = _pdf_text(path, data) if data.startswith(_PDF) else _decoded(data, str(path))
    if not text.strip():
        raise YarnEdgeError(f"{path}: has no text")
    return Document(one_line(path.name), text)


def read_stream(stream: BinaryIO, what: str) -> str:
    """The text of a stream. Raises YarnEdgeError if it is not text, or never ends; `what` names it in the message."""
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise YarnEdgeError(f"{what}: is larger than {MAX_BYTES >> 20} MiB: no context can hold that")
    return _decoded(data, what)


def _decoded(data: bytes, what: str) -> str:
    """Bytes as text, its line ends as \\n."""
    return decode_text(data, what).replace("\r\n", "\n")


def _pdf_text(path: Path, data: bytes) -> str:
    """The pages as pypdf reads them; scanned pages have no text."""
    try:
        import pypdf
    except ImportError as error:
        raise YarnEdgeError(f"{path}: reading PDF needs pypdf: pip install 'yarn-edge[pdf]'") from error
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # its warnings quote the file, and go to stderr
    try:
        pages = pypdf.PdfReader(io.BytesIO(data)).pages
        texts = []
        with bar(f"Reading {path.name}", len(pages)) as advance:
            for page in pages:
                texts.append(page.extract_text().strip())
                advance(1)
    except Exception as error:  # pypdf raises many kinds for hostile files
        raise YarnEdgeError(
            f"{path}: pypdf cannot read it: {one_line(str(error) or type(error).__name__, 200)}"
        ) from error
    return whole_characters("\n\n".join(text for text in texts if text))
