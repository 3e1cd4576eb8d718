"""`yarn-edge quantize`: a GGUF becomes quantized GGUFs, all of them from one reading, or nothing."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, TensorInfo
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.progress import without_notes
from yarn_edge.runtime.ggml_types import GGMLType, types
from yarn_edge.source_file import SourceFile
from yarn_edge.writer import partial_folder

from .file_plan import QUANTIZER, Source, plan_files
from .job import QuantizationJob, run_job
from .moments.collect import collect_moments
from .moments.moments import Moments, importance_for
from .one_pass import SourceTensor
from .outputs import OutputOptions
from .recipe import QuantOptions
from .recipe_flags import add_recipe_flags, calibration_settings, output_options, quant_options

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


def gguf_source(file: GGUFFile) -> Source:
    """A GGUF, split or not, as a source to quantize. Its files stay open."""
    files = {
        path: SourceFile(path, size=file.file_bytes, mtime_ns=file.mtime_ns) if path == file.path else SourceFile(path)
        for path in file.shards
    }
    kinds = types()
    tensors = []
    for info in file.tensors.values():
        if info.type_name not in kinds:
            raise YarnEdgeError(
                f"{info.path}: tensor {one_line(info.name, 100)} has the type {info.type_name}, which ggml does not know"
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
    options: QuantOptions = QuantOptions(),
    allow_requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
) -> list[Path]:
    """Quantize a GGUF (for a split one, its first file). Returns the files written, one for each type in `quant`.

    output: a file name, in which {quant} becomes the type's name. allow_requantize: accept tensors that are quantized
    already. force: overwrite existing files. threads: default all physical cores. Raises YarnEdgeError when anything is
    wrong; then no file is written.
    """
    job = quantize_job(
        _loadable(model), OutputOptions(output, quant, force), options, allow_requantize=allow_requantize
    )
    return job.write(threads)


def quantize_job(
    model: GGUFFile,
    output: OutputOptions,
    options: QuantOptions = QuantOptions(),
    *,
    allow_requantize: bool = False,
    moments: Moments | None = None,
) -> QuantizationJob:
    """`quantize`, planned, for a model whose header was read and checked. Nothing is written. moments: for error feedback."""
    paths = output.checked([*model.shards, *options.files])
    matrix = importance_for(options.imatrix, moments)
    source = gguf_source(model)
    files = plan_files(source, paths, options, matrix, allow_requantize, moments.keys() if moments else {})
    return QuantizationJob(source, files, matrix, partial(_check, source), output.force, moments=moments)


def _loadable(model: str | Path) -> GGUFFile:
    file = read_gguf(model)
    check_loadable(file)
    return file


def _check(source: Source, path: Path) -> None:
    """Read the header back: it must have all tensors, and all keys but those that were to change."""
    written = read_gguf(path, vocabulary=False)
    if (
        list(written.tensors) != [t.name for t in source.tensors]
        or not source.entries.keys() - {QUANTIZER} <= written.metadata.keys()
    ):
        raise YarnEdgeError(f"{path}: the written file does not hold what was written: check the disk")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge quantize`."""
    parser.add_argument("model", metavar="IN.gguf", help="GGUF in F32, F16 or BF16; for a split one, its first file")
    text = "accept an IN.gguf that is quantized already, which costs quality"
    parser.add_argument("--allow-requantize", action="store_true", help=text)
    add_recipe_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge quantize`."""
    model, output, options = _loadable(args.model), output_options(args), quant_options(args)
    planned = partial(quantize_job, model, output, options, allow_requantize=args.allow_requantize)
    calibration = calibration_settings(args)
    if calibration is None or args.dry_run:
        return run_job(planned(), args)
    planned().check_feedback()  # what is wrong is said before the model reads
    with partial_folder(next(iter(output.named()))) as folder:
        moments = collect_moments(model.path, calibration, folder)
        with without_notes():
            job = planned(moments=moments)
        return run_job(job, args)
