"""An importance matrix that is not finished: what is done of it, in a file beside the output, and going on from there.

The file is an importance matrix itself (of the chunks so far) with keys of ours that tell of what run it is. It goes on only with
the same model, text and flags, and sums are held as float32: the outcome is that of one run, to 1e-6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.writer import partial_file, publish

from .matrix import Importance, ImportanceMatrix, read_imatrix, write_imatrix


@dataclass(frozen=True)
class ImatrixRun:
    """What makes two runs the same. `model`, `text`: SHA-256; batch: in tokens; n_chunks: of the whole run."""

    model: str
    text: str
    ctx: int
    n_chunks: int
    batch: int
    process_output: bool
    parse_special: bool

    def keys(self) -> dict[str, str | int | bool]:
        """As they stand in the file, under yarn_edge.imatrix."""
        return dict(vars(self))


_TOLD = {
    "model": "another model",
    "text": "another text",
    "ctx": "--ctx {}",
    "n_chunks": "{} chunks",
    "batch": "--batch {}",
    "process_output": "--process-output {}",
    "parse_special": "--parse-special {}",
}


def text_identity(words: str) -> str:
    """SHA-256 of the text; with the model's vocabulary it decides on the tokens."""
    return hashlib.sha256(words.encode()).hexdigest()


def progress_path(output: Path) -> Path:
    """Where the progress towards `output` stands."""
    return output.with_name(output.name + ".progress")


def save_progress(run: ImatrixRun, matrix: ImportanceMatrix, path: Path) -> None:
    """Write what is done of `matrix`; the file before is replaced when the new one is whole and on the disk."""
    with partial_file(path) as partial:
        write_imatrix(replace(matrix, run=run.keys()), partial)
        publish(partial, path, force=True)


def load_progress(run: ImatrixRun, path: Path) -> ImportanceMatrix:
    """What is done of this run. Raises YarnEdgeError if the file tells of another, or is none."""
    if not path.exists():
        raise YarnEdgeError(f"{path}: does not exist: there is no unfinished run to go on from")
    matrix = read_imatrix(path)
    wanted = run.keys()
    if set(matrix.run) != set(wanted):
        raise YarnEdgeError(f"{path}: is no unfinished run of this version of yarn-edge")
    other = [_TOLD[name].format(_word(matrix.run[name])) for name, value in wanted.items() if matrix.run[name] != value]
    if other:
        raise YarnEdgeError(f"{path}: was begun with {', '.join(other)}; --force instead of --resume begins anew")
    if not 0 < matrix.chunk_count <= run.n_chunks or matrix.chunk_size != run.ctx:
        raise YarnEdgeError(
            f"{path}: has {matrix.chunk_count} chunks done of {run.n_chunks}; --force instead of --resume begins anew"
        )
    return replace(matrix, run={})


def _word(value: str | int | bool) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def added(entries: Mapping[str, Importance], new: Mapping[str, Importance]) -> dict[str, Importance]:
    """Both together. Raises YarnEdgeError where a weight has another shape in the two."""
    together = dict(entries)
    for name, importance in new.items():
        try:
            together[name] = together[name] + importance if name in together else importance
        except ValueError as error:
            raise YarnEdgeError(f"{name}: {error}") from error
    return together
