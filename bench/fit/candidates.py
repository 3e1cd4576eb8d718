"""The files that `fit` compares: an existing GGUF, and those that `convert` or `quantize` would write, as headers.

A planned file has the header and the length of the file that would be written, and no data (a sparse file in a temporary
folder). A simulation reads no more than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.convert.quant_types import known_quants
from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.hub.reference import is_reference
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.memory.weights import Weights, weights_in_memory
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import FLOATS
from yarn_edge.writer import open_output, scratch_folder

if TYPE_CHECKING:
    from yarn_edge.convert.file_plan import FilePlan

QUANTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M")  # from best to worst; docs/compare.md has the loss of each
LAST_RESORT = frozenset({"Q3_K_M"})  # loses so much quality that a shorter context is better


@dataclass(frozen=True)
class Candidate:
    """One file. verb: the command that makes it, None for an existing file. recommended: False if it is only shown."""

    quant: str
    file: GGUFFile
    weights: Weights
    verb: str | None
    recommended: bool = True

    @property
    def last_resort(self) -> bool:
        """Whether it is recommended only if nothing better fits."""
        return self.verb is not None and self.quant in LAST_RESORT


@dataclass(frozen=True)
class Candidates:
    """own: the existing file, if it is a GGUF. plan: a function that plans the others, which takes memory and time."""

    own: Candidate | None
    plan: Callable[[], list[Candidate]]


@contextmanager
def fit_candidates(model: Path) -> Iterator[Candidates]:
    """The candidates of a GGUF or a checkpoint folder, best quality first. Planned files are removed at the end.

    Raises YarnEdgeError if `model` is neither.
    """
    with scratch_folder("yarn-edge-fit-") as folder:
        target = str(folder / "{quant}.gguf")
        if model.is_dir() or is_reference(model):
            yield Candidates(None, cache(lambda: _of_checkpoint(model, target)))
            return
        file = read_gguf(model, vocabulary=False)
        check_loadable(file)
        yield Candidates(
            Candidate(quant_of(file), file, weights_in_memory(file), None), lambda: _quantizations(file, target)
        )


def _of_checkpoint(model: Path, target: str) -> list[Candidate]:
    from yarn_edge.convert.checkpoint import open_checkpoint
    from yarn_edge.convert.hf_to_gguf import convert_job
    from yarn_edge.convert.outputs import OutputOptions
    from yarn_edge.convert.weight_files import find_checkpoint

    folder, remote = find_checkpoint(model)
    own = _own_type({tensor.dtype for tensor in open_checkpoint(folder, remote=remote).tensors.values()})
    plans = convert_job(model, OutputOptions(target, ",".join((own, *QUANTS)))).files
    return [planned_file(plan, "convert", recommended=plan.quant.name in QUANTS) for plan in plans]


def _quantizations(file: GGUFFile, target: str) -> list[Candidate]:
    if any(tensor.type_name not in FLOATS for tensor in file.tensors.values()):
        return []
    from yarn_edge.convert.outputs import OutputOptions
    from yarn_edge.convert.quantize import quantize_job
    from yarn_edge.convert.recipe import QuantOptions

    try:
        plans = quantize_job(file, OutputOptions(target, ",".join(QUANTS)), QuantOptions(kernels="ggml")).files
        return [planned_file(plan, "quantize") for plan in plans]
    except YarnEdgeError as error:
        note(f"quantizations are not shown: {error}")
        return []


def _own_type(dtypes: set[str]) -> str:
    """The 16-bit type for a checkpoint's weights: BF16 for BF16, else F16; F32 is halved, as is usual."""
    return "BF16" if dtypes == {"BF16"} else "F16"


def planned_file(plan: FilePlan, verb: str, *, recommended: bool = True) -> Candidate:
    """A file that is planned, as a header of its length. verb: the command that makes it."""
    try:
        with open_output(plan.path) as out:
            out.write(plan.layout.header)
            out.truncate(plan.layout.file_bytes)
    except OSError as error:
        raise os_error(error, plan.path) from error
    file = read_gguf(plan.path, vocabulary=False)
    return Candidate(plan.quant.name, file, weights_in_memory(file), verb, recommended)


def quant_of(file: GGUFFile) -> str:
    """The file type that the header names (general.file_type), else the type of most weights."""
    number = file.metadata.get("general.file_type")
    named: dict[int, str] = {quant.ftype: name for name, quant in known_quants().items()}
    if isinstance(number, int) and number in named:
        return named[number]
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        weights[tensor.type_name] += tensor.n_elements
    return weights.most_common(1)[0][0] if weights else "-"
