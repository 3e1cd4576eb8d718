"""A GGUF on a worker: the file must be there under the same path, and must be the same file."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.identity import model_identity
from yarn_edge.gguf.read import read_gguf
from yarn_edge.regular_file import is_named


@dataclass(frozen=True)
class SentFile:
    """path: absolute, of a split file the first; n_bytes: of all parts; identity: `model_identity`."""

    path: str
    n_bytes: int
    identity: str

    @classmethod
    def of(cls, file: GGUFFile) -> SentFile:
        """What a worker must find."""
        return cls(str(file.path.absolute()), _n_bytes(file), model_identity(file))

    def read(self) -> GGUFFile:
        """The file on this worker. Raises YarnEdgeError if it is missing, or not the same."""
        path, here = Path(self.path), socket.gethostname()
        if not is_named(path):
            raise YarnEdgeError(
                f"{path}: does not exist on {here}: copy it there, or name it by a path that all workers see"
            )
        file = read_gguf(path)
        n_bytes = _n_bytes(file)
        if n_bytes != self.n_bytes:
            raise YarnEdgeError(
                f"{path}: has {n_bytes} bytes on {here}, {self.n_bytes} where the command runs: copy it again"
            )
        if model_identity(file) != self.identity:
            raise YarnEdgeError(f"{path}: is another model on {here} than where the command runs: copy it again")
        return file


def _n_bytes(file: GGUFFile) -> int:
    return sum(part.stat().st_size for part in file.shards or (file.path,))
