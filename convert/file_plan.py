"""What will be written before anything is: for each file its recipe, its header, its size, and the time it should take.

A `Source` is what can be read once and quantized: a checkpoint as convert sees it, or a GGUF. Recipes are llama.cpp's
(`recipe`), keys are those that llama.cpp's quantizer adds.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.header import HeaderLayout, TensorSpec, lay_out, pack_key
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import GGMLType, requires_weights

from .imatrix.matrix import ImportanceMatrix
from .kernels.choose import Kernels, choose_kernels
from .kernels.layout import LAYOUTS
from .one_pass import Output, SourceTensor
from .quant_types import Quant
from .recipe import EMBEDDINGS, Recipe, TypeChoice, header_file, read_recipe

QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
QUANTIZER = "yarn_edge.quantizer"  # which kernels made the K-quants (`kernels`)
_STRING_BYTES = 127  # llama.h: llama_model_kv_override.val_str, with its NUL
_LARGEST_IMPORTANCE = 1e15  # ggml's kernels add up importance times squares in float32
_SAMPLE_WIDTH, _SAMPLE_ROWS, _SAMPLE_SECONDS = 2048, 8, 0.05


@dataclass(frozen=True)
class Source:
    """Something to quantize. `entries`: packed keys by name; `declared`: the types that llama.cpp is told to start from.

    check_unchanged: raises YarnEdgeError if it is not what it was any more.
    """

    path: Path
    entries: Mapping[str, bytes]
    tensors: Sequence[SourceTensor]
    declared: Mapping[str, GGMLType]
    alignment: int
    check_unchanged: Callable[[], None]

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors, as they are read."""
        return sum(t.n_bytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(t.n_rows * t.width for t in self.tensors)


@dataclass(frozen=True)
class FilePlan:
    """One file to make: where, by which recipe and kernels, and its header."""

    path: Path
    quant: Quant
    recipe: Recipe
    layout: HeaderLayout
    n_weights: int
    kernels: Kernels

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file's tensors for each weight."""
        return 8 * (self.layout.file_bytes - len(self.layout.header)) / self.n_weights

    def output(self, path: Path) -> Output:
        """For the pipeline, under another name."""
        return Output(path, self.layout.header, self.layout.file_bytes, self.recipe.types, self.layout.offsets)


def plan_files(
    source: Source,
    paths: Mapping[Path, Quant],
    choice: TypeChoice,
    matrix: ImportanceMatrix | None,
    allow_requantize: bool = False,
    kernels: str | None = None,
) -> list[FilePlan]:
    """A plan for each path; kernels as in `kernels.choose`.

    Raises YarnEdgeError for what llama.cpp refuses, and where importance or kernels are needed and missing.
    """
    if not source.tensors:
        raise YarnEdgeError(f"{source.path}: has no tensors, so there is nothing to quantize")
    widths = {t.name: t.width for t in source.tensors}
    recipes = []
    with header_file(*_for_recipe(source)) as header:
        for quant in paths.values():
            recipe = read_recipe(header, widths, quant, choice, matrix is not None)
            _check_importance(source, recipe, matrix)
            _check_requantized(source, recipe, allow_requantize)
            recipes.append(recipe)
    chosen = choose_kernels(kernels, _work(source, recipes))
    plans = [_plan(source, *row, matrix, chosen) for row in zip(paths.items(), recipes, strict=True)]
    _tell(plans)
    return plans


def _plan(
    source: Source, file: tuple[Path, Quant], recipe: Recipe, matrix: ImportanceMatrix | None, kernels: Kernels
) -> FilePlan:
    path, quant = file
    entries = dict(source.entries) | _added_keys(quant, matrix)
    quantizer = _quantizer(source, recipe, kernels)
    if quantizer is not None:
        entries[QUANTIZER] = pack_key(QUANTIZER, quantizer)
    elif not _copied(source, recipe):
        entries.pop(QUANTIZER, None)
    specs = [_spec(t, recipe.types[t.name]) for t in source.tensors]
    layout = lay_out(list(entries.values()), specs, source.alignment)
    return FilePlan(path, quant, recipe, layout, source.n_weights, kernels)


def _quantizer(source: Source, recipe: Recipe, kernels: Kernels) -> str | None:
    """Whose kernels make the K-quants of a file; None where none is made. Copied ones beside them are told."""
    if not any(kind.name in LAYOUTS for kind in _work(source, [recipe])):
        return None
    return kernels.quantizer + (", others copied" if _copied(source, recipe) else "")


def _copied(source: Source, recipe: Recipe) -> bool:
    """Whether K-quants of the source stay as they are."""
    return any(t.kind.name in LAYOUTS and recipe.types[t.name] == t.kind for t in source.tensors)


def _work(source: Source, recipes: Iterable[Recipe]) -> Counter[GGMLType]:
    """Weights to make of each type: outputs share them, and what has its type already is copied."""
    work: Counter[GGMLType] = Counter()
    for tensor in source.tensors:
        for kind in {recipe.types[tensor.name] for recipe in recipes} - {tensor.kind}:
            work[kind] += tensor.n_rows * tensor.width
    return work


def _for_recipe(source: Source) -> tuple[list[bytes], list[TensorSpec]]:
    """Keys and tensors of the header that llama.cpp is asked about: the architecture's are all that it looks at."""
    others = ("tokenizer.", "general.alignment", "quantize.", "yarn_edge.")
    keys = [e for key, e in source.entries.items() if key and key.isprintable() and not key.startswith(others)]
    return keys, [_spec(t, source.declared[t.name]) for t in source.tensors]


def _spec(tensor: SourceTensor, kind: GGMLType) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.ne, kind.number, tensor.n_rows * kind.row_bytes(tensor.width))


def _added_keys(quant: Quant, matrix: ImportanceMatrix | None) -> dict[str, bytes]:
    """What llama.cpp's quantizer writes (llama-quant.cpp; tools/quantize/quantize.cpp for the importance matrix)."""
    added: dict[str, Any] = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": quant.ftype}
    if matrix is not None:
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


def importance_weights(source: Source, matrix: ImportanceMatrix | None) -> dict[str, Any]:
    """Importance weights by tensor name, (matrices * width,) float32, of the tensors that have an entry."""
    found: dict[str, Any] = {}
    if matrix is None:
        return found
    for tensor in source.tensors:
        entry = matrix.entries.get(tensor.name)
        if entry is None:
            continue
        weights, name = entry.weights(), one_line(tensor.name, 100)
        if weights.max(initial=0) > _LARGEST_IMPORTANCE:
            raise YarnEdgeError(f"{matrix.path}: {name} has an importance of {weights.max():g}: it is damaged")
        if weights.size == tensor.n_rows // tensor.rows_per_matrix * tensor.width:
            found[tensor.name] = weights
        elif tensor.name not in EMBEDDINGS:  # llama.cpp passes over these alone
            raise YarnEdgeError(
                f"{matrix.path}: has {weights.size} values for {name}, whose shape is {list(tensor.ne)}: it was made for "
                "another model"
            )
    return found


def _check_importance(source: Source, recipe: Recipe, matrix: ImportanceMatrix | None) -> None:
    have = importance_weights(source, matrix)
    kinds = {t.name: t.kind for t in source.tensors}
    cannot = [n for n, kind in recipe.types.items() if kind != kinds[n] and requires_weights(kind)]
    lacking = [name for name in dict.fromkeys((*recipe.requires_importance, *cannot)) if name not in have]
    quantized = [
        n for n, kind in recipe.types.items() if not kind.is_float and kind != kinds[n] and n not in EMBEDDINGS
    ]
    if matrix is not None and quantized and not have:
        raise YarnEdgeError(
            f"{matrix.path}: has no entry for any tensor of {source.path}: it was made for another model"
        )
    if matrix is not None and (without := [n for n in quantized if n not in have]) and not lacking:
        note(f"{recipe.quant.name}: {_listed(without)} have no entry in the importance matrix: quantized without")
    if lacking:
        needs = f"{recipe.quant.name} needs an importance matrix for {_listed(lacking)}"
        if matrix is None:
            raise YarnEdgeError(f"{needs}: `yarn-edge imatrix` makes one, --imatrix FILE takes it")
        raise YarnEdgeError(f"{matrix.path}: {needs}, and has none for them")


def _check_requantized(source: Source, recipe: Recipe, allowed: bool) -> None:
    again = [t for t in source.tensors if not t.kind.is_float and recipe.types[t.name] != t.kind]
    if again and not allowed:
        kinds = ", ".join(sorted({t.kind.name for t in again}))
        raise YarnEdgeError(
            f"{source.path}: {_listed([t.name for t in again])} are quantized already ({kinds}); to {recipe.quant.name} from there "
            "costs quality: take the 16-bit file, or pass --allow-requantize"
        )


def _listed(names: Sequence[str]) -> str:
    shown = one_line(", ".join(names[:2]), 120)
    return f"{len(names)} tensors ({shown}, …)" if len(names) > 2 else shown


def _tell(plans: Iterable[FilePlan]) -> None:
    """Notes on what is not as asked: rows that a type cannot hold, patterns that change nothing."""
    for plan in plans:
        replaced = Counter((f.width, f.wanted, f.used) for f in plan.recipe.fallbacks)
        for (width, wanted, used), n in replaced.items():
            note(f"{plan.quant.name}: {n} tensors have rows of {width}, which {wanted} cannot hold: {used} instead")
        for pattern in plan.recipe.without_effect:
            note(f"warning: {plan.quant.name}: --tensor-type {pattern!r} changes no tensor's type")


def estimated_seconds(source: Source, plans: Sequence[FilePlan], threads: int) -> float:
    """Seconds of computing for all plans, from a sample of each type that is measured here; reading and writing overlap it."""
    work = _work(source, [plan.recipe for plan in plans])
    return sum(n / _weights_per_second(kind, plans[0].kernels) for kind, n in work.items()) / threads


def _weights_per_second(kind: GGMLType, kernels: Kernels) -> float:
    """What one core does, on rows as weights are: normally distributed."""
    rows = np.random.default_rng(0).normal(0, 0.02, (_SAMPLE_ROWS, _SAMPLE_WIDTH)).astype(np.float32)
    weights = np.ones(_SAMPLE_WIDTH, np.float32) if requires_weights(kind) else None
    out = np.empty((_SAMPLE_ROWS, kind.row_bytes(_SAMPLE_WIDTH)), np.uint8)
    kernels.quantize_into(kind, rows[:1], out[:1], weights)  # ggml builds its tables at the first call
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < _SAMPLE_SECONDS:
        kernels.quantize_into(kind, rows, out, weights)
        done += rows.size
    return done / took


def as_json(source: Source, plans: Sequence[FilePlan], seconds: float, threads: int) -> dict[str, Any]:
    """The plan as data: every tensor's type and bytes of every file."""
    by_name = {t.name: t for t in source.tensors}
    return {
        "source": str(source.path),
        "source_bytes": source.n_bytes,
        "n_weights": source.n_weights,
        "threads": threads,
        "seconds": round(seconds, 2),
        "files": [
            {
                "quant": plan.quant.name,
                "output": str(plan.path),
                "file_bytes": plan.layout.file_bytes,
                "bits_per_weight": round(plan.bits_per_weight, 4),
                "quantizer": _quantizer(source, plan.recipe, plan.kernels),
                "fallbacks": [vars(f) for f in plan.recipe.fallbacks],
                "tensors": [
                    {"name": name, "ne": list(by_name[name].ne), "type": kind.name, "from": by_name[name].kind.name}
                    for name, kind in plan.recipe.types.items()
                ],
            }
            for plan in plans
        ],
    }


def as_table(source: Source, plans: Sequence[FilePlan], seconds: float, threads: int) -> str:
    """The plan for people: a line for each file, and one for each type in it."""
    lines = []
    by_name = {t.name: t for t in source.tensors}
    for plan in plans:
        size, bits = plan.layout.file_bytes / 1e6, plan.bits_per_weight
        lines.append(f"{plan.path}: {plan.quant.name}, {size:.1f} MB, {bits:.2f} bits per weight")
        tensors: Counter[GGMLType] = Counter(plan.recipe.types.values())
        weights: Counter[GGMLType] = Counter()
        for name, kind in plan.recipe.types.items():
            weights[kind] += by_name[name].n_rows * by_name[name].width
        for kind, n in sorted(weights.items(), key=lambda item: -item[1]):
            n_bytes = n // kind.block * kind.block_bytes
            lines.append(
                f"  {kind.name:<8}{tensors[kind]:>5} tensors {n / 1e6:>10.2f} M weights {n_bytes / 1e6:>10.1f} MB"
            )
    total = sum(plan.layout.file_bytes for plan in plans) / 1e6
    lines.append(
        f"in all {total:.1f} MB from one reading of {source.n_bytes / 1e6:.1f} MB, about {seconds:.0f} s of computing with "
        f"{threads} threads by {plans[0].kernels.quantizer} (measured on a sample)"
    )
    return "\n".join(lines) + "\n"
