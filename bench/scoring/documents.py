"""The texts to measure on: a file, a folder of files, or JSON Lines. Each is a document, read only as far as needed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.progress import bar
from yarn_edge.regular_file import open_regular, read_file_or_pipe
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.text_file import decode_text

JSON_LINES = (".jsonl", ".ndjson")
MAX_LINE = 1 << 28  # bytes of one line of JSON
MAX_PIPE = 1 << 30  # bytes of text from a pipe
_BYTES_A_TOKEN = 8  # a first guess; more is read if it is not enough
_TAIL = 64  # tokens before a cut that could have been others with more text after them


@dataclass(frozen=True)
class ScoredDocument:
    """One text: a file, or one line of JSON (offset and n_bytes in the file, key of the text), or `words` in memory."""

    name: str
    path: Path | None = None
    offset: int = 0
    n_bytes: int = 0
    key: str = ""
    words: str = ""

    def read(self, limit: int | None = None) -> tuple[str, bool]:
        """(text, whether it is complete): about `limit` bytes, cut after white space. Raises YarnEdgeError."""
        if self.path is None:
            return self.words, True
        try:
            with open_regular(self.path) as file:
                file.seek(self.offset)
                if self.key:
                    return self._of_json(file.read(self.n_bytes)), True
                data = file.read(-1 if limit is None else limit)
                whole = not file.read(1)
        except OSError as error:
            raise os_error(error, self.path) from error
        text = decode_text(data, self.path, complete=whole)
        if whole:
            return text.removesuffix("\n"), True  # llama-perplexity drops the last line break, too
        kept = max(text.rfind(" "), text.rfind("\n"))
        return (text[: kept + 1] if kept > 0 else text), False

    def _of_json(self, line: bytes) -> str:
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise YarnEdgeError(f"{self.name}: is not JSON: {error}") from error
        text = row.get(self.key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            has = ", ".join(list(row)[:8]) if isinstance(row, dict) else type(row).__name__
            raise YarnEdgeError(f"{self.name}: has no text under {self.key!r} (it has {has}): --field names the key")
        return text


def documents_of(
    text: str | Path | None, *, field: str = "text", wanted: int | None = None, seed: int = 0
) -> list[ScoredDocument]:
    """The documents of a file, a folder (its files, by name) or a JSON Lines file; None means the bundled text.

    wanted: maximum number; if there are more, a random sample in their order, the same for the same seed. Raises YarnEdgeError
    if there are none.
    """
    if text is None:
        documents = [ScoredDocument("the bundled text (Ruth and 1 Samuel)", words=sample_text())]
    else:
        path = Path(text)
        try:
            documents = _in_folder(path) if path.is_dir() else _in_file(path, field)
        except OSError as error:
            raise os_error(error, path) from error
    if not documents:
        raise YarnEdgeError(f"{text}: contains no documents")
    if wanted is not None and len(documents) > wanted:
        chosen = sorted(random.Random(seed).sample(range(len(documents)), wanted))
        documents = [documents[i] for i in chosen]
    return documents


def _in_folder(folder: Path) -> list[ScoredDocument]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    return [ScoredDocument(p.name, p) for p in files]


def _piped(path: Path) -> str:
    """All text from a pipe. Other things that are not files may never end, and are refused."""
    return decode_text(read_file_or_pipe(path, MAX_PIPE), path).removesuffix("\n")


def _in_file(path: Path, field: str) -> list[ScoredDocument]:
    if not path.is_file() and path.exists():
        return [ScoredDocument(path.name, words=_piped(path))]
    if path.suffix.lower() not in JSON_LINES:
        return [ScoredDocument(path.name, path)]
    documents: list[ScoredDocument] = []
    at, size = 0, path.stat().st_size
    with open_regular(path) as file, bar(f"Finding the documents of {path.name}", size, "bytes") as advance:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            if len(line) == MAX_LINE:
                raise YarnEdgeError(f"{path}: line {number} is longer than {MAX_LINE} bytes: is it JSON Lines?")
            if line.strip():
                documents.append(ScoredDocument(f"{path.name}:{number}", path, at, len(line), field))
            at += len(line)
            advance(len(line))
    return documents


def tokens_of(model: Model, document: ScoredDocument, wanted: int | None = None) -> list[int]:
    """The first `wanted` token ids of a document (None: all of them), with BOS if the model asks for it, without EOS.

    Raises YarnEdgeError if the document has no text.
    """
    limit = None if wanted is None else wanted * _BYTES_A_TOKEN + 4096
    while True:
        text, whole = document.read(limit)
        if not text.strip() and whole:
            place = document.name if document.key or document.path is None else document.path
            raise YarnEdgeError(f"{place}: contains no text")
        tokens = model.tokenize(text, add_special=True, parse_special=False)
        if model.add_eos and tokens and tokens[-1] == model.eos:
            tokens.pop()
        if whole or limit is None or (wanted is not None and len(tokens) >= wanted + _TAIL):
            return tokens if wanted is None else tokens[:wanted]
        limit *= 2


def tokenized(
    model: Model, documents: Sequence[ScoredDocument], wanted: int | None = None, max_tokens: int | None = None
) -> list[list[int]]:
    """`tokens_of` each document. max_tokens: limit for all documents together; the last ones are cut or left out."""
    tokens: list[list[int]] = []
    left = max_tokens
    with bar("Tokenizing", len(documents), "steps") as advance:
        for document in documents:
            if left is not None and left < 2:
                break
            most = min((n for n in (wanted, left) if n is not None), default=None)
            tokens.append(tokens_of(model, document, most))
            left = None if left is None else left - len(tokens[-1])
            advance(1, document.name)
    return tokens
