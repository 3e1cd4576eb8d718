"""The folder beside an output in which a calibration works, and from which a run goes on if an earlier one was ended."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import Terminated
from yarn_edge.progress import note
from yarn_edge.regular_file import read_regular
from yarn_edge.resumable import find_left_over
from yarn_edge.writer import partial_folder, write_file

_KEY, _TOLD = "key", "told"
_KEY_BYTES = 128
_MOST_BYTES = 1 << 32


@contextmanager
def calibration_folder(output: Path, key: str) -> Iterator[Path]:
    """A folder beside `output`: that of an earlier run with the same key, or a new one. Ctrl-C leaves it, an error removes it."""
    made: list[Path] = []

    def keeps(error: BaseException) -> bool:
        kept = isinstance(error, (KeyboardInterrupt, Terminated)) and any(
            path.name != _KEY for folder in made for path in folder.iterdir()
        )
        if kept:
            note(f"note: {made[0]} stays: run the same command again to go on, or remove it")
        return kept

    def fits(folder: Path) -> bool:
        return (folder / _KEY).is_file() and read_regular(folder / _KEY, _KEY_BYTES) == key.encode()

    def find(output: Path) -> tuple[Path, int | None] | None:
        return find_left_over(output, Path.is_dir, fits)

    with partial_folder(output, find, keeps) as folder:
        made.append(folder)
        if not (folder / _KEY).exists():
            write_file(folder / _KEY, key, force=False)
        yield folder


def save_progress_arrays(path: Path, told: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Keep values and arrays in place of those of before, whole or not at all."""
    file = io.BytesIO()
    values = np.frombuffer(json.dumps(told).encode(), np.uint8)
    np.savez(file, **{_TOLD: values}, **arrays)  # type: ignore[arg-type]
    write_file(path, file.getvalue(), force=True)


def load_progress_arrays(path: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]] | None:
    """What was kept; None if there is nothing that can be read."""
    if not path.is_file():
        return None
    try:
        data = read_regular(path, _MOST_BYTES)
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        return json.loads(arrays.pop(_TOLD).tobytes()), arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
