"""Reads a document from a file: text in UTF-8 (or UTF-16 with a byte order mark), or a PDF with the extra `yarn-edge[pdf]`."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.chat.conversation import Document
from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.progress import bar
from yarn_edge.text_file import decode_text

MAX_BYTES = 256 << 20
_PDF = b"%PDF-"


def read_document(path: Path) -> Document:
    """The text of a file. Raises YarnEdgeError if it is not text, is empty, or cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise os_error(error, path) from error
    if len(data) > MAX_BYTES:
        raise YarnEdgeError(f"{path}: is larger than {MAX_BYTES >> 20} MiB: no context can hold that")
    text = _pdf_text(path) if data.startswith(_PDF) else decoded(data, str(path))
    if not text.strip():
        raise YarnEdgeError(f"{path}: has no text")
    return Document(path.name, text)


def decoded(data: bytes, what: str) -> str:
    """Bytes as text, its line ends as \\n. Raises YarnEdgeError if they are not text; `what` names them in its message."""
    return decode_text(data, what).replace("\r\n", "\n")


def _pdf_text(path: Path) -> str:
    """The pages as pypdf reads them; scanned pages have no text."""
    try:
        import pypdf
    except ImportError as error:
        raise YarnEdgeError(f"{path}: reading PDF needs pypdf: pip install 'yarn-edge[pdf]'") from error
    try:
        with path.open("rb") as file:
            pages = pypdf.PdfReader(file).pages
            texts = []
            with bar(f"Reading {path.name}", len(pages)) as advance:
                for page in pages:
                    texts.append(page.extract_text().strip())
                    advance(1)
    except Exception as error:  # pypdf raises many kinds for hostile files
        raise YarnEdgeError(
            f"{path}: pypdf cannot read it: {one_line(str(error) or type(error).__name__, 200)}"
        ) from error
    return "\n\n".join(text for text in texts if text)
