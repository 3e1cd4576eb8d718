"""`yarn-edge convert`: a Hugging Face checkpoint becomes quantized GGUF files, or nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import (
    EXACT,
    NO_OVERRIDES,
    PlannerOptions,
    ScalingOverrides,
    add_planner_flags,
    add_scaling_flags,
    add_trust_flag,
    planner_options,
    scaling_overrides,
)
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.progress import note, without_notes

from .adapter_file import adapter_job
from .adapters.base import base_of
from .adapters.requests import AdaptedCheckpoint, add_adapter_flags
from .calibration import Calibration
from .conversion import ConversionPlan, check_header, check_positions, checkpoint_source, plan_conversion, tell
from .file_plan import FilePlan, plan_files
from .imatrix.matrix import read_imatrix
from .job import QuantizationJob, collector_paused, run_job
from .kernels.choose import FAST
from .outputs import OutputOptions
from .proving import CalibrationProof
from .recipe import QuantOptions
from .recipe_flags import add_recipe_flags, calibration_of, output_options, quant_options
from .size_report import STANDARD, check_picture, tell_sizes
from .sizing.sized import SizeWanted, check_size, check_types, size_plan, size_wanted, with_types
from .vocab_proof import UnprovedTokenizer
from .weight_files import find_checkpoint, whole_folder

_Result = TypeVar("_Result")


def convert(
    checkpoint: str | Path | AdaptedCheckpoint,
    output: str,
    quant: str = "Q4_K_M",
    *,
    options: QuantOptions = QuantOptions(),
    force: bool = False,
    threads: int | None = None,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
) -> list[Path]:
    """Convert a checkpoint folder, hf:ORG/NAME[@REVISION] on the Hub, or one of them with adapters merged into it.

    Returns the files written, one for each type in `quant`: names, comma-separated. output: a file name, in which {quant} becomes the
    type's name. force: overwrite existing files. threads: default all physical cores. overrides: scaling values on top of
    config.json; planner: which forms of positions may be written. Raises YarnEdgeError when anything cannot be carried over exactly;
    then no file is written.
    """
    target = OutputOptions(output, quant, force)
    planned = partial(convert_job, checkpoint, target, options, overrides=overrides, planner=planner)
    return _proving_meanwhile(planned, lambda job: job.write(threads))


def convert_job(
    checkpoint: str | Path | AdaptedCheckpoint,
    output: OutputOptions,
    options: QuantOptions = QuantOptions(),
    *,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    proved: bool = True,
) -> QuantizationJob:
    """`convert`, planned: everything is read and checked but the weights, and nothing is written.

    proved: prove the tokenizer now; otherwise the job's `write` proves it beside the tensors, and may raise UnprovedTokenizer.
    """
    output.checked(options.files)  # before anything is asked of the Hub
    asked, remote = _in_folders(
        checkpoint if isinstance(checkpoint, AdaptedCheckpoint) else AdaptedCheckpoint(checkpoint, ())
    )
    paths = output.checked([*asked.files, *options.files])
    matrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    with collector_paused():
        plan = plan_conversion(asked, overrides, planner, proved, remote)
        if proved:
            tell(plan)
        source = checkpoint_source(plan)
        files = plan_files(source, paths, options, matrix)
    return QuantizationJob(source, files, matrix, partial(check_positions, plan), output.force, _header_check(plan))


def _in_folders(asked: AdaptedCheckpoint) -> tuple[AdaptedCheckpoint, RemoteWeights | None]:
    """(what is asked for, as folders; the weights that stay on the Hub). With adapters none do: they are not read in their order."""
    if not asked.adapters:
        folder, remote = find_checkpoint(base_of(asked))
        return replace(asked, base=folder), remote
    adapters = tuple(replace(request, folder=whole_folder(request.folder)) for request in asked.adapters)
    asked = replace(asked, adapters=adapters)
    return replace(asked, base=whole_folder(base_of(asked))), None


def _header_check(plan: ConversionPlan) -> Callable[[Path], None]:
    """`check_header`, which tells of a plan when the first file has proved it."""
    untold = not plan.proved

    def check(path: Path) -> None:
        nonlocal untold
        gaps = check_header(plan, path)
        if untold:
            tell(plan, gaps)
        untold = False

    return check


def _proving_meanwhile(planned: Callable[..., QuantizationJob], write: Callable[[QuantizationJob], _Result]) -> _Result:
    """`write` for a job that proves its tokenizer beside the tensors; where that fails, all is done again with the proof before it."""
    try:
        return write(planned(proved=False))
    except UnprovedTokenizer:
        return write(planned(proved=True))


def _calibrated(
    checkpoint: AdaptedCheckpoint,
    planned: Callable[..., QuantizationJob],
    calibration: Calibration,
    args: argparse.Namespace,
) -> int:
    """The model is written in BF16 beside the output, reads the texts, and is removed."""
    options, wanted = quant_options(args), _size_of(checkpoint, args)
    job = planned(options=options)  # what is wrong is said before that
    job.check_feedback()
    if wanted is not None:
        check_size(wanted, job.source.tensors, job.files[0])
    output = next(iter(output_options(args).named()))
    with calibration.at_work(job.source, output, wanted is not None) as work:
        whole = partial(_whole, checkpoint, work.folder / "whole.gguf", args)
        moments = work.moments(whole)
        texts = calibration.texts
        proof = CalibrationProof.of(whole(), texts, work.folder, args.threads) if texts else None
        if wanted is not None:
            moments = replace(moments, method="error feedback, types by sensitivity")
            job = job.calibrated(options, moments, proof)  # whose header has all keys
            moments = work.with_gradients(moments, Path(str(checkpoint.base)))
            assert moments.gradients is not None
            kept = work.folder / "costs.json"
            sized = size_plan(wanted, job.source.tensors, job.files[0], moments, moments.gradients, kept)
            options = with_types(options, sized.types)
        job = job.calibrated(options, moments, proof)
        if wanted is not None:
            check_types(sized.types, job.files[0].recipe.types)
            if args.dry_run:
                return tell_sizes(sized, job, standard_files(checkpoint, args), args)
        return run_job(replace(job, folder=work.folder), args)


def _whole(checkpoint: AdaptedCheckpoint, path: Path, args: argparse.Namespace) -> Path:
    """The checkpoint in 16 bits."""
    if not path.exists():
        note("the model is written in 16 bits beside the output, reads the texts, and is removed")
        how = {"overrides": scaling_overrides(args), "planner": planner_options(args), "threads": args.threads}
        with without_notes():
            convert(checkpoint, str(path), "BF16", **how)
    return path


def standard_files(checkpoint: AdaptedCheckpoint, args: argparse.Namespace) -> list[FilePlan]:
    """Plans of files of the usual types, for comparison."""
    output = OutputOptions("{quant}.gguf", ",".join(STANDARD), True)
    scaling, planner = scaling_overrides(args), planner_options(args)
    with without_notes():
        job = convert_job(
            checkpoint, output, QuantOptions(kernels=FAST), overrides=scaling, planner=planner, proved=False
        )
    return list(job.files)


def _size_of(checkpoint: AdaptedCheckpoint, args: argparse.Namespace) -> SizeWanted | None:
    """--size. Raises YarnEdgeError if it does not go with the other flags."""
    if args.size is None:
        return None
    if checkpoint.adapters:
        raise YarnEdgeError("--size measures the checkpoint itself, without --adapter: choose a --quant instead")
    if quant_options(args) != QuantOptions(kernels=FAST):
        raise YarnEdgeError(
            "--size chooses every type: leave out --tensor-type, --output-type, --embedding-type and --pure"
        )
    if len(output_options(args).named()) > 1:
        raise YarnEdgeError("--size makes one file: give --quant one type, from which it starts")
    return size_wanted(args.size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge convert`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="folder with config.json, weights and tokenizer, or hf:ORG/NAME",
    )
    add_adapter_flags(parser)
    add_recipe_flags(parser)
    text = (
        "with --calibrate: choose each tensor's type so that the file has this size, in bytes (120MB, 2.5GiB) or bits per weight "
        "(4.5bpw), and loses least"
    )
    parser.add_argument("--size", metavar="SIZE", help=text)
    text = "with --size and --dry-run: draw what each size would cost (needs yarn-edge[plot])"
    parser.add_argument("--plot", metavar="FILE.png", help=text)
    add_trust_flag(parser)
    add_planner_flags(parser)
    add_scaling_flags(parser, "on top of config.json, or YaRN for a plain checkpoint")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge convert`."""
    checkpoint = AdaptedCheckpoint.of(args.checkpoint, *args.adapter)
    if args.as_adapter:
        return run_job(_adapter_job(checkpoint, args), args)
    planned = partial(
        convert_job, checkpoint, output_options(args), overrides=scaling_overrides(args), planner=planner_options(args)
    )
    calibration = calibration_of(args)
    check_picture(args)
    if args.size is not None and calibration is None:
        raise YarnEdgeError("--size needs to know what matters: pass --calibrate TEXT,TEXT as well")
    if calibration is not None and (args.size is not None or not args.dry_run):
        return _calibrated(checkpoint, planned, calibration, args)
    planned = partial(planned, options=quant_options(args))
    if args.dry_run:
        return run_job(planned(), args)
    return _proving_meanwhile(planned, lambda job: run_job(job, args))


def _adapter_job(checkpoint: AdaptedCheckpoint, args: argparse.Namespace) -> QuantizationJob:
    """--as-adapter. Raises YarnEdgeError for flags that ask for another type."""
    if any(value is not None for value in (args.calibrate, args.moments, args.size)):
        raise YarnEdgeError("--as-adapter writes float32: leave out --calibrate, --moments and --size")
    if args.quant not in (None, "F32") or quant_options(args) != QuantOptions():
        raise YarnEdgeError("--as-adapter writes float32: leave out --quant, --imatrix and what else chooses types")
    output = OutputOptions(args.output, "F32", args.force)
    return adapter_job(checkpoint, output, scaling_overrides(args), planner_options(args))
