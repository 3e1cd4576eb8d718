"""Sums of x xᵀ in a file: of each matrix the panels of rows from the diagonal on, since the rest is their mirror image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import open_regular
from yarn_edge.writer import check_space, flush_file, open_output

PANEL = 512  # rows
Floats = npt.NDArray[np.float32]


def panels_of(width: int) -> Iterator[tuple[int, int, int]]:
    """(first row, end, where it begins in the matrix's numbers) of each panel; it has the columns from its first row on."""
    at = 0
    for first in range(0, width, PANEL):
        end = min(first + PANEL, width)
        yield first, end, at
        at += (end - first) * (width - first)


def sums_floats(width: int) -> int:
    """Numbers that are kept of a (width, width) matrix."""
    return sum((end - first) * (width - first) for first, end, _at in panels_of(width))


@dataclass(frozen=True)
class SumsPlace:
    """Where the sums of one input are: byte `offset` of the file `path`."""

    path: Path
    offset: int
    width: int

    def numbers(self, first: int, count: int) -> Floats:
        """Some of the numbers. Raises YarnEdgeError for a file that ends before, and for what are no sums."""
        with open_regular(self.path) as file:
            file.seek(self.offset + 4 * first)
            found = np.fromfile(file, "<f4", count)
        if len(found) != count:
            raise YarnEdgeError(f"{self.path}: ends before its moments do: it was truncated")
        if not np.isfinite(found).all():
            raise YarnEdgeError(f"{self.path}: has moments that are infinite or NaN")
        return found


class StoredSums(Mapping[str, Floats]):
    """The sums by input: each is read when it is asked for, as new memory of the shape (width, width)."""

    def __init__(self, places: Mapping[str, SumsPlace]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> Floats:
        place = self.places[name]
        width = place.width
        whole = np.empty((width, width), np.float32)
        for first, end, at in panels_of(width):
            panel = place.numbers(at, (end - first) * (width - first)).reshape(end - first, width - first)
            whole[first:end, first:] = panel
            whole[end:, first:end] = panel[:, end - first :].T
        return whole

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class GrowingSums:
    """Sums that are added to. Each has two places: one as of the last finished window, one with what was read since, so that a run
    that was killed goes on where a window ended. places, windows: of such a run, and how many it finished.
    """

    def __init__(
        self, path: Path, places: Mapping[str, tuple[int, int]] = MappingProxyType({}), windows: int = 0
    ) -> None:
        self.path = path
        self._places = dict(places)  # by input: byte offset of both places, width
        self._written = dict.fromkeys(places, windows)  # the window in which each was written last
        self._window = windows + 1  # that is read now
        self._end = max((at + 8 * sums_floats(width) for at, width in places.values()), default=0)
        with open_output(path, "a"):
            pass
        self._file = open_output(path, "r+")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def add(self, name: str, x: Floats) -> npt.NDArray[np.float64]:
        """Add x xᵀ, x (rows, width). Returns its diagonal."""
        width = x.shape[1]
        if name not in self._places:
            check_space(self.path.parent, 8 * sums_floats(width), "moments")
            self._places[name], self._written[name] = (self._end, width), 0
            self._end += 8 * sums_floats(width)
        diagonal = np.empty(width)
        for first, end, at in panels_of(width):
            with np.errstate(all="ignore"):
                panel = x[:, first:end].T @ x[:, first:]
            diagonal[first:end] = np.diagonal(panel)
            if self._written[name]:
                panel += self._read(self._offset(name, self._written[name]) + 4 * at, panel.size).reshape(panel.shape)
            self._write(self._offset(name, self._window) + 4 * at, panel)
        self._written[name] = self._window
        return diagonal

    def finish(self) -> dict[str, tuple[int, int]]:
        """A window ends. Returns by input where its places are and its width, for a run that goes on; what is there is on the disk."""
        for name, (_at, width) in self._places.items():
            if self._written[name] != self._window:  # an expert that no token of this window reached
                held = self._read(self._offset(name, self._written[name]), sums_floats(width))
                self._write(self._offset(name, self._window), held)
                self._written[name] = self._window
        flush_file(self.path)
        self._window += 1
        return dict(self._places)

    def stored(self) -> StoredSums:
        """The sums after the last finished window."""
        places = {n: SumsPlace(self.path, self._offset(n, self._window - 1), w) for n, (_at, w) in self._places.items()}
        return StoredSums(places)

    def _offset(self, name: str, window: int) -> int:
        at, width = self._places[name]
        return at + window % 2 * 4 * sums_floats(width)

    def _read(self, at: int, count: int) -> Floats:
        held = np.empty(count, np.float32)
        self._file.seek(at)
        if self._file.readinto(held.view(np.uint8).data) != held.nbytes:
            raise YarnEdgeError(f"{self.path}: cannot be read back: check the disk")
        return held

    def _write(self, at: int, values: Floats) -> None:
        self._file.seek(at)
        left = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        while left:
            left = left[self._file.write(left) or 0 :]
