"""The progress of an unfinished importance matrix, in a file beside the output, from which a run can resume.

The file is itself an importance matrix (of the chunks so far), with our keys that identify the run. A run resumes only with
the same model, text and flags. Sums are stored as float32, so the result equals that of an uninterrupted run to 1e-6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import is_named
from yarn_edge.writer import partial_file, publish

from .matrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix


@dataclass(frozen=True)
class ImatrixRun:
    """What identifies a run. model, text: SHA-256. batch: in tokens. n_chunks: of the whole run."""

    model: str
    text: str
    ctx: int
    n_chunks: int
    batch: int
    process_output: bool
    parse_special: bool

    def keys(self) -> dict[str, str | int | bool]:
        """The keys in the file, under yarn_edge.imatrix."""
        return dict(vars(self))


_DESCRIPTIONS = {
    "model": "another model",
    "text": "another text",
    "ctx": "--ctx {}",
    "n_chunks": "{} chunks",
    "batch": "--batch {}",
    "process_output": "--process-output {}",
    "parse_special": "--parse-special {}",
}


def text_identity(words: str) -> str:
    """SHA-256 of the text; with the model's vocabulary, it determines the tokens."""
    return hashlib.sha256(words.encode()).hexdigest()


def progress_path(output: Path) -> Path:
    """The file that holds the progress towards `output`."""
    return output.with_name(output.name + ".progress")


def save_progress(run: ImatrixRun, matrix: ImportanceMatrix, path: Path) -> None:
    """Write the finished part of `matrix`. The old file is replaced only once the new one is complete and on the disk."""
    with partial_file(path) as partial:
        write_imatrix(replace(matrix, run=run.keys()), partial)
        publish(partial, path, force=True)


def load_progress(run: ImatrixRun, path: Path) -> ImportanceMatrix:
    """The finished part of this run. Raises YarnEdgeError if the file belongs to another run, or there is none."""
    if not is_named(path):
        raise YarnEdgeError(f"{path}: does not exist: there is no unfinished run to resume")
    matrix = read_imatrix(path)
    wanted = run.keys()
    if set(matrix.run) != set(wanted):
        raise YarnEdgeError(f"{path}: is not an unfinished run of this version of yarn-edge")
    differences = [
        _DESCRIPTIONS[name].format(_word(matrix.run[name]))
        for name, value in wanted.items()
        if matrix.run[name] != value
    ]
    if differences:
        raise YarnEdgeError(f"{path}: was begun with {', '.join(differences)}; --force instead of --resume starts over")
    if not 0 < matrix.chunk_count <= run.n_chunks or matrix.chunk_size != run.ctx:
        raise YarnEdgeError(
            f"{path}: has {matrix.chunk_count} of {run.n_chunks} chunks; --force instead of --resume starts over"
        )
    return replace(matrix, run={})


def _word(value: str | int | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def added(entries: Mapping[str, Importance], new: Mapping[str, Importance]) -> dict[str, Importance]:
    """The sum of both. Raises YarnEdgeError if a weight has different shapes in the two."""
    together = dict(entries)
    for name, importance in new.items():
        try:
            together[name] = together[name] + importance if name in together else importance
        except ValueError as error:
            raise YarnEdgeError(f"{name}: {error}") from error
    return together
