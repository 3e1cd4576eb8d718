"""Where `convert` and `quantize` write: the names of the files, and whether they can be written at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.resumable import left_over_bytes
from yarn_edge.writer import check_output, check_space

from .file_plan import FilePlan
from .quant_types import Quant, parse_quants


@dataclass(frozen=True)
class OutputOptions:
    """The files to write. pattern: a file name, in which {quant} becomes the type's name. quant: file types, separated by
    commas. force: overwrite existing files."""

    pattern: str
    quant: str = "Q4_K_M"
    force: bool = False

    def named(self) -> dict[Path, Quant]:
        """File -> type. Raises YarnEdgeError for an unknown type, or if several types would share one name."""
        quants = parse_quants(self.quant)
        if not self.pattern:
            raise YarnEdgeError("-o is empty: give the name of a file")
        if len(quants) > 1 and "{quant}" not in self.pattern:
            raise YarnEdgeError(
                f"-o {self.pattern}: {len(quants)} types were requested, so the name must hold {{quant}}"
            )
        return {Path(self.pattern.replace("{quant}", q.name)): q for q in quants}

    def checked(self, sources: Iterable[Path]) -> dict[Path, Quant]:
        """`named`, after checking that each file may be written (`writer.check_output`). sources: the files that are read."""
        sources = list(sources)
        checked: dict[Path, Quant] = {}
        for path, quant in self.named().items():
            target = check_output(path, self.force, sources)
            if target in checked:
                raise YarnEdgeError(f"{path}: is the same file as the one for {checked[target].name}")
            checked[target] = quant
        return checked


def check_disk_room(plans: Sequence[FilePlan]) -> None:
    """Raise YarnEdgeError, before any work, if the files would not fit on their disks."""
    by_folder: dict[Path, int] = {}
    for plan in plans:
        by_folder[plan.path.parent] = (
            by_folder.get(plan.path.parent, 0) + plan.layout.file_bytes - left_over_bytes(plan.path)
        )
    for folder, n_bytes in by_folder.items():
        check_space(folder, n_bytes, "the output")
