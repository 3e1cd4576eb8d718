"""`yarn-edge convert`: a Hugging Face checkpoint becomes quantized GGUF files, or nothing."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

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
from yarn_edge.progress import note

from .conversion import check_header, check_positions, checkpoint_source, plan_conversion
from .file_plan import plan_files
from .imatrix.matrix import read_imatrix
from .job import QuantizationJob, collector_paused, run_job
from .outputs import OutputOptions
from .recipe import QuantOptions
from .recipe_flags import add_recipe_flags, output_options, quant_options


def convert(
    checkpoint: str | Path,
    output: str,
    quant: str = "Q4_K_M",
    *,
    options: QuantOptions = QuantOptions(),
    force: bool = False,
    threads: int | None = None,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
) -> list[Path]:
    """Convert a checkpoint folder. Returns the files written, one for each type in `quant` (comma-separated).

    output: a file name, in which {quant} becomes the type's name. force: overwrite existing files. threads: default all
    physical cores. overrides: scaling values on top of config.json; planner: which forms of positions may be written. Raises
    YarnEdgeError when anything cannot be carried over exactly; then no file is written.
    """
    job = convert_job(checkpoint, OutputOptions(output, quant, force), options, overrides=overrides, planner=planner)
    return job.write(threads)


def convert_job(
    checkpoint: str | Path,
    output: OutputOptions,
    options: QuantOptions = QuantOptions(),
    *,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
) -> QuantizationJob:
    """`convert`, planned: everything is read and checked but the weights, and nothing is written."""
    folder = Path(checkpoint)
    paths = output.checked([*(folder.iterdir() if folder.is_dir() else ()), *options.files])
    matrix = None if options.imatrix is None else read_imatrix(options.imatrix)
    with collector_paused():
        plan = plan_conversion(folder, overrides, planner)
        note(f"{plan.architecture.hf_name}: {plan.scaling_summary}; tokenizer {plan.vocabulary.pre}, proved")
        source = checkpoint_source(plan)
        files = plan_files(source, paths, options, matrix)
    checks = partial(check_positions, plan), partial(check_header, plan)
    return QuantizationJob(source, files, matrix, checks[0], output.force, checks[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge convert`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, weights and tokenizer")
    add_recipe_flags(parser)
    add_trust_flag(parser)
    add_planner_flags(parser)
    add_scaling_flags(parser, "on top of config.json, or YaRN for a plain checkpoint")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge convert`."""
    job = convert_job(
        args.checkpoint,
        output_options(args),
        quant_options(args),
        overrides=scaling_overrides(args),
        planner=planner_options(args),
    )
    return run_job(job, args)
