"""What will be written, decided before anything is: for each file its recipe, its header and its size.

A `Source` can be read once and quantized: a checkpoint as convert sees it, or a GGUF. Recipes are llama.cpp's (`recipe`), and
the added keys are those that llama.cpp's quantizer adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.header import HeaderLayout, TensorSpec, lay_out, pack_key
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import FLOATS, GGMLType

from .imatrix.matrix import ImportanceMatrix
from .importance import check_importance, name_list
from .kernels.choose import Kernels, choose_kernels
from .kernels.layout import LAYOUTS
from .one_pass import SourceTensor
from .output_file import Output
from .quant_types import Quant, known_quants
from .recipe import QuantOptions, Recipe, header_file, read_recipe

QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
QUANTIZER = "yarn_edge.quantizer"  # the kernels that made the K-quants (`kernels`)
_STRING_BYTES = 127  # llama.h: llama_model_kv_override.val_str, with its NUL


@dataclass(frozen=True)
class Source:
    """Something to quantize. entries: packed keys by name. declared: the types that llama.cpp's recipe starts from.

    kept: tensors that no recipe changes. check_unchanged: raises YarnEdgeError if the files have changed since they were opened.
    remote: the weights that are a stream.
    """

    path: Path
    entries: Mapping[str, bytes]
    tensors: Sequence[SourceTensor]
    declared: Mapping[str, GGMLType]
    alignment: int
    check_unchanged: Callable[[], None]
    kept: frozenset[str] = frozenset()
    remote: RemoteWeights | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the source."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.n_rows * t.width for t in self.tensors)


@dataclass(frozen=True)
class FilePlan:
    """One file to make. quantizer: what is written as yarn_edge.quantizer; None if there are no K-quants."""

    path: Path
    quant: Quant
    recipe: Recipe
    layout: HeaderLayout
    n_weights: int
    kernels: Kernels
    quantizer: str | None

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file's tensors for each weight."""
        return 8 * (self.layout.file_bytes - len(self.layout.header)) / self.n_weights

    def output(self, path: Path) -> Output:
        """What the pipeline fills, under the name `path`."""
        return Output(path, self.layout.header, self.layout.file_bytes, self.recipe.types, self.layout.offsets)


def plan_files(
    source: Source,
    paths: Mapping[Path, Quant],
    options: QuantOptions,
    matrix: ImportanceMatrix | None,
    allow_requantize: bool = False,
    calibration: Mapping[str, Any] = MappingProxyType({}),
) -> list[FilePlan]:
    """A plan for each path. matrix: the contents of `options.imatrix`, or what calibration gave. calibration: keys that say how.

    Raises YarnEdgeError for anything that llama.cpp refuses, or if importance weights or kernels are needed and missing.
    """
    if not source.tensors:
        raise YarnEdgeError(f"{source.path}: has no tensors to quantize")
    widths = {t.name: t.width for t in source.tensors}
    kept = {t.name: t.kind for t in source.tensors if t.name in source.kept}
    recipes = []
    with header_file(*_for_recipe(source)) as header:
        for quant in paths.values():
            recipe = read_recipe(header, widths, quant, options, kept)
            check_importance(source.path, source.tensors, recipe, matrix)
            _check_requantized(source, recipe, allow_requantize)
            recipes.append(recipe)
    chosen = choose_kernels(options.kernels, work_by_type(source, recipes))
    plans = [_plan(source, *row, matrix, chosen, calibration) for row in zip(paths.items(), recipes, strict=True)]
    _note_differences(plans)
    return plans


def _plan(
    source: Source,
    file: tuple[Path, Quant],
    recipe: Recipe,
    matrix: ImportanceMatrix | None,
    kernels: Kernels,
    calibration: Mapping[str, Any],
) -> FilePlan:
    path, quant = file
    entries = dict(source.entries) | _added_keys(_file_type(source, quant), matrix)
    entries |= {key: pack_key(key, value) for key, value in calibration.items()}
    quantizer = _quantizer(source, recipe, kernels)
    if quantizer is not None:
        quantizer += ", error feedback" if calibration else ""
        entries[QUANTIZER] = pack_key(QUANTIZER, quantizer)
    elif not _copied(source, recipe):
        entries.pop(QUANTIZER, None)
    specs = [_spec(t, recipe.types[t.name]) for t in source.tensors]
    layout = lay_out(list(entries.values()), specs, source.alignment)
    return FilePlan(path, quant, recipe, layout, source.n_weights, kernels, quantizer)


def _quantizer(source: Source, recipe: Recipe, kernels: Kernels) -> str | None:
    """The kernels that make the K-quants of a file, and whether others are copied; None if none is made."""
    if not any(kind.name in LAYOUTS for kind in work_by_type(source, [recipe])):
        return None
    return kernels.quantizer + (", others copied" if _copied(source, recipe) else "")


def _copied(source: Source, recipe: Recipe) -> bool:
    """Whether K-quants of the source are copied."""
    return any(t.kind.name in LAYOUTS and recipe.types[t.name] == t.kind for t in source.tensors)


def work_by_type(source: Source, recipes: Iterable[Recipe]) -> Counter[GGMLType]:
    """Weights to quantize to each type. Outputs share them, and tensors that have their type already are copied."""
    work: Counter[GGMLType] = Counter()
    for tensor in source.tensors:
        for kind in {recipe.types[tensor.name] for recipe in recipes} - {tensor.kind}:
            work[kind] += tensor.n_rows * tensor.width
    return work


def _for_recipe(source: Source) -> tuple[list[bytes], list[TensorSpec]]:
    """Keys and tensors of the header for `read_recipe`: of the keys, llama.cpp looks only at the architecture's."""
    others = ("tokenizer.", "general.alignment", "quantize.", "yarn_edge.")
    keys = [e for key, e in source.entries.items() if key and key.isprintable() and not key.startswith(others)]
    return keys, [_spec(t, source.declared[t.name]) for t in source.tensors]


def _spec(tensor: SourceTensor, kind: GGMLType) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.ne, kind.number, tensor.n_rows * kind.row_bytes(tensor.width))


def _file_type(source: Source, quant: Quant) -> int:
    """What general.file_type says: as in llama.cpp's converter, that of the tensors that stay quantized among floats."""
    return known_quants()["MXFP4_MOE"].ftype if source.kept and quant.name in FLOATS else quant.ftype


def _added_keys(file_type: int, matrix: ImportanceMatrix | None) -> dict[str, bytes]:
    """The keys that llama.cpp's quantizer adds (llama-quant.cpp; tools/quantize/quantize.cpp for the importance matrix)."""
    added: dict[str, Any] = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": file_type}
    if matrix is not None and matrix.path is not None:
        added["quantize.imatrix.file"] = _cut(str(matrix.path))
        if matrix.datasets:
            added["quantize.imatrix.dataset"] = _cut(matrix.datasets[0])
        added["quantize.imatrix.entries_count"] = len(matrix.entries)
        if matrix.chunk_count > 0:
            added["quantize.imatrix.chunks_count"] = matrix.chunk_count
    return {key: pack_key(key, value) for key, value in added.items()}


def _cut(text: str) -> str:
    data = text.encode("utf-8", errors="surrogateescape")[:_STRING_BYTES]
    return data.decode("utf-8", errors="ignore") if len(data) == _STRING_BYTES else text


def _check_requantized(source: Source, recipe: Recipe, allowed: bool) -> None:
    again = [t for t in source.tensors if not t.kind.is_float and recipe.types[t.name] != t.kind]
    if again and not allowed:
        kinds = ", ".join(sorted({t.kind.name for t in again}))
        raise YarnEdgeError(
            f"{source.path}: {name_list([t.name for t in again])} are quantized already ({kinds}), and quantizing them again to "
            f"{recipe.quant.name} costs quality: use the 16-bit file, or pass --allow-requantize"
        )


def _note_differences(plans: Iterable[FilePlan]) -> None:
    """Notes on what differs from the request: rows that a type cannot hold, patterns that change nothing."""
    for plan in plans:
        replaced = Counter((f.width, f.wanted, f.used) for f in plan.recipe.fallbacks)
        for (width, wanted, used), n in replaced.items():
            note(
                f"{plan.quant.name}: {n} tensors have rows of {width}, which {wanted} cannot hold: {used} is used instead"
            )
        for pattern in plan.recipe.without_effect:
            note(f"warning: {plan.quant.name}: --tensor-type {pattern!r} changes no tensor's type")
