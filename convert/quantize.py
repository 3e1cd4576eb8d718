"""`yarn-edge quantize`: a GGUF becomes quantized GGUFs, all of them from one reading. Also what `convert` ends in.

The types are llama.cpp's own choice (`recipe`), the arithmetic is ggml's, also where it is done faster (`kernels`); the files
are whole and checked before they get their names, or they are not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.runtime.ggml_types import GGMLType, types
from yarn_edge.source_file import SourceFile

from .file_plan import QUANTIZER, FilePlan, Source, plan_files
from .imatrix.matrix import ImportanceMatrix, read_imatrix
from .one_pass import SourceTensor
from .outputs import add_recipe_flags, carry_out, checked_paths, choice_of, make_files
from .quant_types import parse_quants
from .recipe import TypeChoice

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def gguf_source(file: GGUFFile) -> Source:
    """A GGUF, split or not, as something to quantize. Its files stay open."""
    files = {
        path: SourceFile(path, size=file.file_bytes, mtime_ns=file.mtime_ns) if path == file.path else SourceFile(path)
        for path in file.shards
    }
    kinds = types()
    tensors = []
    for info in file.tensors.values():
        if info.type_name not in kinds:
            raise YarnEdgeError(
                f"{info.path}: tensor {one_line(info.name, 100)} has the type {info.type_name}, unknown to ggml here"
            )
        tensors.append(_gguf_tensor(info, kinds[info.type_name], files[info.path]))
    header = files[file.path].read(file.header_end)
    entries = {key: header[e.start : e.end] for key, e in file.entries.items() if key not in _SPLIT_KEYS}

    def check_unchanged() -> None:
        for opened in files.values():
            opened.check_unchanged()

    return Source(file.path, entries, tensors, {t.name: t.kind for t in tensors}, file.alignment, check_unchanged)


def _gguf_tensor(info: TensorInfo, kind: GGMLType, file: SourceFile) -> SourceTensor:
    row_bytes = kind.row_bytes(info.shape[0])

    def read(first_row: int, out: Any) -> None:
        file.read_into(out, info.offset + first_row * row_bytes)

    return SourceTensor(info.name, info.shape, kind, read, f"{info.path}: tensor {one_line(info.name, 100)}")


def quantize(
    model: str | Path,
    output: str,
    quant: str = "Q4_K_M",
    *,
    imatrix: str | Path | None = None,
    choice: TypeChoice | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    kernels: str | None = None,
) -> list[Path]:
    """Quantize a GGUF (of a split one its first file). Returns the files written, one for each type in `quant`.

    imatrix: a file of llama.cpp's kind. allow_requantize: also from types that are quantized already. kernels: "fast",
    "ggml", or None for what is done sooner. Raises YarnEdgeError when anything is wrong; then no file was written.
    """
    source, plans, matrix = plan_quantization(
        model,
        output,
        quant,
        imatrix=imatrix,
        choice=choice,
        allow_requantize=allow_requantize,
        force=force,
        kernels=kernels,
    )
    return make_files(source, plans, matrix, lambda path: _check(source, path), threads=threads, force=force)


def plan_quantization(
    model: str | Path,
    output: str,
    quant: str,
    *,
    imatrix: str | Path | None = None,
    choice: TypeChoice | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    kernels: str | None = None,
) -> tuple[Source, list[FilePlan], ImportanceMatrix | None]:
    """`quantize` as far as nothing is written."""
    quants = parse_quants(quant)
    file = read_gguf(model)
    check_loadable(file)
    paths = checked_paths(output, quants, force, [*file.shards, *([Path(imatrix)] if imatrix else [])])
    matrix = None if imatrix is None else read_imatrix(imatrix)
    source = gguf_source(file)
    return source, plan_files(source, paths, choice or TypeChoice(), matrix, allow_requantize, kernels), matrix


def _check(source: Source, path: Path) -> None:
    """Read the header back: all tensors, and all keys but those that were to change."""
    written = read_gguf(path, vocabulary=False)
    if (
        list(written.tensors) != [t.name for t in source.tensors]
        or not source.entries.keys() - {QUANTIZER} <= written.metadata.keys()
    ):
        raise YarnEdgeError(f"{path}: the written file does not hold what was written: is the disk sound?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge quantize`."""
    parser.add_argument("model", metavar="IN.gguf", help="F32, F16 or BF16; of a split one the first file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.gguf", help="{quant} in it becomes the type's name"
    )
    parser.add_argument(
        "--allow-requantize", action="store_true", help="also from a quantized IN.gguf, which costs quality"
    )
    add_recipe_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge quantize`."""
    source, plans, matrix = plan_quantization(
        args.model,
        args.output,
        args.quant,
        imatrix=args.imatrix,
        choice=choice_of(args),
        allow_requantize=args.allow_requantize,
        force=args.force,
        kernels=args.kernels,
    )

    def make() -> object:
        return make_files(
            source, plans, matrix, lambda path: _check(source, path), threads=args.threads, force=args.force
        )

    return carry_out(source, plans, args, make)
