"""Standard output: text for people, or one JSON object for programs, written at once.

It carries data only: progress and notes go to stderr (`progress`), files are written by `writer`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from yarn_edge.foreign_text import harmless, harmless_json


def write_text(text: str, *, need_reader: bool = True) -> None:
    """Write a text for people, without what a terminal would obey (`foreign_text.harmless`). need_reader as in `write_data`."""
    write_data(harmless(text), need_reader=need_reader)


def write_data(text: str, *, need_reader: bool = True) -> None:
    """Write `text` as it is, and flush: for what is read by a program.

    If the reader has left (`| head`), BrokenPipeError is raised; with need_reader=False the command goes on to its own exit
    code, and the rest of its output is dropped.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        if need_reader:
            raise
        drop_the_rest()


def write_json(data: Mapping[str, Any], *, need_reader: bool = True) -> None:
    """Write `data` as one JSON object on one line: values as in `plain`, need_reader as in `write_data`."""
    write_data(json_text(data, sys.stdout.encoding) + "\n", need_reader=need_reader)


def drop_the_rest() -> None:
    """Let everything that is still written to stdout, also at exit, go nowhere instead of into the closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def json_text(data: Mapping[str, Any], encoding: str | None = "utf-8", indent: int | None = None) -> str:
    """`data` as JSON, values as in `plain`.

    Escaped are characters that a terminal would obey; and all but ASCII if `encoding` lacks one, or a file name is not UTF-8.
    """
    values = plain(data)
    text = harmless_json(json.dumps(values, ensure_ascii=False, allow_nan=False, indent=indent))
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return harmless_json(json.dumps(values, allow_nan=False, indent=indent))
    return text


def plain(value: Any) -> Any:
    """`value` in JSON's types. NaN and infinity, which JSON lacks, become null; NumPy's values, paths and tuples are accepted."""
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars, without importing it
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
