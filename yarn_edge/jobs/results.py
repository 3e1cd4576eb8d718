"""Results of units on disk, one score file each, named by the key of the unit: what a later run of the same command finds."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.jobs.unit import Unit, UnitResult
from yarn_edge.progress import note
from yarn_edge.regular_file import is_named, open_regular
from yarn_edge.signals import deferred_ctrl_c
from yarn_edge.writer import write_file

_ARRAY = "array "  # before an array's name in the file, which also has a "header"


class ResultFolder:
    """The score files in `folder`; nothing is kept if it is None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise os_error(error, folder) from error

    def get(self, unit: Unit) -> UnitResult | None:
        """The result of a unit that was finished before. A damaged file is computed again, with a note."""
        if self.folder is None:
            return None
        path = self.folder / f"{unit.key}.npz"
        if not is_named(path):
            return None
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                arrays = {name.removeprefix(_ARRAY): stored[name] for name in stored.files if name.startswith(_ARRAY)}
            if header["key"] != unit.key or sorted(arrays) != header["arrays"]:
                raise ValueError("another unit")
            return UnitResult(arrays, dict(header["facts"]), earlier=True)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, YarnEdgeError) as error:
            note(f"{path}: is damaged and computed again ({type(error).__name__})")
            return None

    def put(self, unit: Unit, result: UnitResult) -> None:
        """Keep a result: written whole or not at all."""
        if self.folder is None:
            return
        header = json.dumps({"key": unit.key, "arrays": sorted(result.arrays), "facts": dict(result.facts)})
        archive = io.BytesIO()
        with deferred_ctrl_c():
            arrays = {_ARRAY + name: array for name, array in result.arrays.items()}
            np.savez(archive, **{"header": np.array(header), **arrays})  # type: ignore[arg-type]
        write_file(self.folder / f"{unit.key}.npz", archive.getvalue(), force=True, follow_links=False)
