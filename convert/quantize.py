"""`yarn-edge quantize`: a GGUF becomes quantized GGUFs, all of them from one reading, or nothing."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import check_loadable

from .file_plan import QUANTIZER, Source, plan_files
from .gguf_source import gguf_source
from .imatrix.matrix import read_imatrix
from .job import QuantizationJob, run_job
from .outputs import OutputOptions
from .proving import CalibrationProof
from .recipe import QuantOptions
from .recipe_flags import add_recipe_flags, calibration_of, output_options, quant_options


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
    model: GGUFFile, output: OutputOptions, options: QuantOptions = QuantOptions(), *, allow_requantize: bool = False
) -> QuantizationJob:
    """`quantize`, planned, for a model whose header was read and checked. Nothing is written."""
    paths = output.checked([*model.shards, *options.files])
    matrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    source = gguf_source(model)
    files = plan_files(source, paths, options, matrix, allow_requantize)
    return QuantizationJob(source, files, matrix, partial(_check, source), output.force)


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
    calibration = calibration_of(args)
    job = quantize_job(model, output, options, allow_requantize=args.allow_requantize)
    if calibration is None or args.dry_run:
        return run_job(job, args)
    job.check_feedback()  # what is wrong is said before the model reads
    with calibration.at_work(job.source, next(iter(output.named()))) as work:
        moments = work.moments(lambda: model.path)
        texts = calibration.texts
        proof = CalibrationProof.of(model.path, texts, work.folder, args.threads) if texts else None
        job = job.calibrated(options, moments, proof, args.allow_requantize)
        return run_job(replace(job, folder=work.folder), args)
