"""`yarn-edge convert`: a Hugging Face checkpoint becomes quantized GGUF files, or nothing.

Order of work: read the config into a RopeScaling and ask the simulation of llama.cpp whether a GGUF can carry it; match
every tensor of the checkpoint with a row of the family; prove the tokenizer; only then write.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge import __version__
from yarn_edge.checkpoint.dialects import head_dim
from yarn_edge.checkpoint.read import read_scaling
from yarn_edge.checkpoint.tokenizer import Reference
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import (
    EXACT,
    NO_OVERRIDES,
    PlannerOptions,
    ScalingOverrides,
    add_planner_flags,
    add_scaling_flags,
    planner_options,
    scaling_overrides,
)
from yarn_edge.gguf.header import pack_key
from yarn_edge.gguf.read import DEFAULT_ALIGNMENT
from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.effective import FREQUENCY_FACTORS, angle_error
from yarn_edge.llama_rules.planner import RopePlan, plan_rope
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import check_kernel
from yarn_edge.verify.tokenizer import check_tokens, reference_encoder

from .checkpoint import DTYPES, Checkpoint, Tensor, open_checkpoint, same_bits
from .families.architectures import (
    Architecture,
    ModelSizes,
    TensorRow,
    architecture_of,
    check_sliding_window,
    hyper_parameters,
    interleave,
    model_sizes,
    tensor_rows,
    unknown_tensor,
)
from .file_plan import FilePlan, Source, plan_files
from .imatrix.matrix import ImportanceMatrix, read_imatrix
from .one_pass import SourceTensor
from .outputs import add_recipe_flags, carry_out, checked_paths, choice_of, make_files
from .quant_types import parse_quants
from .recipe import TypeChoice
from .vocab import Vocabulary, prove, read_vocabulary


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion that is known before a weight is read."""

    checkpoint: Checkpoint
    architecture: Architecture
    sizes: ModelSizes
    scaling: RopeScaling
    rope: RopePlan
    reference: Reference
    vocabulary: Vocabulary
    rows: list[TensorRow]
    keys: dict[str, Any]


def plan_conversion(
    folder: Path, overrides: ScalingOverrides = NO_OVERRIDES, planner: PlannerOptions = EXACT
) -> ConversionPlan:
    """Read and check all but the weights' values. Raises YarnEdgeError for whatever cannot be carried over."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    row = architecture_of(config)
    scaling = read_scaling(config, overrides)
    if scaling.dim != head_dim(config):
        raise YarnEdgeError(
            f"{scaling.source('dim')}: {scaling.dim} of {head_dim(config)} dimensions are rotated; llama.cpp runs {row.gguf} "
            "only where all are"
        )
    rope_plan = plan_rope(scaling, row.gguf, planner)
    if rope_plan.told:
        note(rope_plan.told)
    check_sliding_window(row, config, scaling)
    sizes = model_sizes(row, config)
    rows = _match_tensors(checkpoint, row, sizes, scaling)
    reference = reference_encoder(folder)
    vocabulary = prove(read_vocabulary(folder, sizes.vocab, reference), folder, reference)
    for text in vocabulary.notes:
        note(f"note: {text}")
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": one_line(_model_name(folder), 200),
        "yarn_edge.version": __version__,
        **hyper_parameters(row, config, sizes, scaling.extended_context),
        **rope_plan.keys,
        **canonical_keys(scaling, rope_plan.form),
        **vocabulary.keys(),
    }
    return ConversionPlan(checkpoint, row, sizes, scaling, rope_plan, reference, vocabulary, rows, keys)


def _model_name(folder: Path) -> str:
    """The folder's name; in the layout of the Hugging Face cache (models--ORG--NAME/snapshots/HASH) the model's."""
    folder = folder.absolute()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.split("--")[-1] if cached else folder.resolve().name


def _match_tensors(
    checkpoint: Checkpoint, row: Architecture, sizes: ModelSizes, scaling: RopeScaling
) -> list[TensorRow]:
    """The rows to write; every tensor of the checkpoint is used, and has the shape that the config says."""
    rows = tensor_rows(row, checkpoint.config, sizes)
    tensors = checkpoint.tensors
    for r in rows:
        if r.source not in tensors:
            raise YarnEdgeError(f"{checkpoint.path}: tensor {r.source} is missing")
        expected = tuple(sizes.dimension(name) for name in r.shape)
        if tensors[r.source].shape != expected:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {r.source} has the shape {list(tensors[r.source].shape)}, "
                f"config.json makes it {list(expected)}"
            )
    used = {r.source for r in rows}
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name.endswith("rotary_emb.inv_freq"):
            _check_inv_freq(checkpoint, tensor, scaling)
        elif name == "lm_head.weight":
            if not same_bits(tensor, tensors["model.embed_tokens.weight"]):
                raise YarnEdgeError(
                    f"{checkpoint.path}: lm_head.weight differs from the embeddings, but config.json ties them "
                    "(tie_word_embeddings): correct one of them"
                )
        else:
            raise unknown_tensor(name)
    return rows


def _check_inv_freq(checkpoint: Checkpoint, tensor: Tensor, scaling: RopeScaling) -> None:
    """A saved frequency buffer is not needed, but it must agree with the config, or one of the two is wrong."""
    saved = tensor.float32().astype(np.float64)
    rounding = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}[tensor.dtype]
    floor = 1e-7 if tensor.dtype == "F16" else 0.0  # half precision has no smaller numbers
    plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
    for wanted in (rope.inv_freq(scaling), plain):
        if saved.shape == wanted.shape and bool(np.all(np.abs(saved - wanted) <= rounding * wanted + floor)):
            return
    raise YarnEdgeError(
        f"{checkpoint.path}: {tensor.name} holds other frequencies than config.json describes (rope_theta, rope scaling)"
    )


def checkpoint_source(plan: ConversionPlan) -> Source:
    """The checkpoint as something to quantize: its tensors under their names in the GGUF, its keys packed.

    llama.cpp's recipe starts from what upstream's converter would write: vectors in float32, matrices as they are.
    """
    tensors = [_source_tensor(plan, row) for row in plan.rows]
    declared = {t.name: type_named("F32") if len(t.ne) == 1 else t.kind for t in tensors}
    factors = plan.rope.factors
    if factors is not None:
        tensors.append(_factors_tensor(factors))
        declared[tensors[-1].name] = tensors[-1].kind
    keys = {"general.architecture": plan.architecture.gguf, **plan.keys}
    entries = {key: pack_key(key, value) for key, value in keys.items()}
    checkpoint = plan.checkpoint
    return Source(checkpoint.path, entries, tensors, declared, DEFAULT_ALIGNMENT, checkpoint.check_unchanged)


def _source_tensor(plan: ConversionPlan, row: TensorRow) -> SourceTensor:
    tensor, sizes = plan.checkpoint.tensors[row.source], plan.sizes
    kind, ne = type_named(tensor.dtype), tuple(reversed(tensor.shape))
    told = f"{plan.checkpoint.path}: tensor {row.source}"
    item = DTYPES[tensor.dtype][0]

    def read(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        tensor.read(first_row * kind.row_bytes(ne[0]), out.reshape(-1))

    def read_interleaved(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        read(first_row, out)
        rows = out.view(item).reshape(-1) if len(ne) == 1 else out
        rows[:] = interleave(sizes, rows)

    if not row.interleaved:
        return SourceTensor(row.target, ne, kind, read, told)
    return SourceTensor(row.target, ne, kind, read_interleaved, told, 1 if len(ne) == 1 else sizes.head_dim)


def _factors_tensor(factors: npt.NDArray[np.float32]) -> SourceTensor:
    def read(_first_row: int, out: npt.NDArray[np.uint8]) -> None:
        out[0] = factors.view(np.uint8)

    return SourceTensor(FREQUENCY_FACTORS, factors.shape, type_named("F32"), read, FREQUENCY_FACTORS)


def _check_result(plan: ConversionPlan, path: Path) -> None:
    """Read the written file back: its positions by llama.cpp's rules, its description, its token ids."""
    with Model(path, vocab_only=True) as model:
        mismatch = check_tokens(model, plan.reference).mismatch
    runs = model.positions.runs
    if angle_error(runs, plan.rope.runs).any_difference or model.positions.canonical != plan.scaling:
        raise YarnEdgeError(f"{path}: the written file would not run the checkpoint's positions")
    kernel = check_kernel(runs, runs, plan.architecture.gguf)
    if kernel.status != "pass":
        raise YarnEdgeError(f"{path}: ggml's rope kernel computes other positions here: {kernel.detail}")
    if mismatch is not None:
        raise YarnEdgeError(f"{path}: the written file tokenizes otherwise than the checkpoint: {mismatch}")


def convert(
    checkpoint: str | Path,
    output: str,
    quant: str = "Q4_K_M",
    *,
    imatrix: str | Path | None = None,
    choice: TypeChoice | None = None,
    force: bool = False,
    threads: int | None = None,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    kernels: str | None = None,
) -> list[Path]:
    """Convert a checkpoint folder. Returns the files written, one for each type in `quant` (comma-separated).

    imatrix: an importance matrix of llama.cpp's kind; choice: types of single tensors; overrides: scaling values on top of
    config.json; planner: which forms of positions may be written; kernels: "fast", "ggml", or None for what is done sooner.
    Raises YarnEdgeError when anything cannot be carried over exactly; then no file was written.
    """
    job = plan_files_of(
        checkpoint,
        output,
        quant,
        imatrix=imatrix,
        choice=choice,
        force=force,
        overrides=overrides,
        planner=planner,
        kernels=kernels,
    )
    return job.make(threads, force)


@dataclass(frozen=True)
class Job:
    """A conversion that is planned to the last byte."""

    plan: ConversionPlan
    source: Source
    files: list[FilePlan]
    matrix: ImportanceMatrix | None

    def make(self, threads: int | None, force: bool) -> list[Path]:
        """Write the files. Returns their paths."""
        return make_files(
            self.source,
            self.files,
            self.matrix,
            lambda path: _check_result(self.plan, path),
            threads=threads,
            force=force,
        )


def plan_files_of(
    checkpoint: str | Path,
    output: str,
    quant: str,
    *,
    imatrix: str | Path | None = None,
    choice: TypeChoice | None = None,
    force: bool = False,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    kernels: str | None = None,
) -> Job:
    """`convert` as far as nothing is written."""
    folder = Path(checkpoint)
    sources = list(folder.iterdir()) if folder.is_dir() else []
    sources += [Path(imatrix)] if imatrix else []
    paths = checked_paths(output, parse_quants(quant), force, sources)
    matrix = None if imatrix is None else read_imatrix(imatrix)
    plan = plan_conversion(folder, overrides, planner)
    note(f"{plan.architecture.hf_name}: {_describe(plan.scaling)}; tokenizer {plan.vocabulary.pre}, proved")
    source = checkpoint_source(plan)
    return Job(plan, source, plan_files(source, paths, choice or TypeChoice(), matrix, kernels=kernels), matrix)


def _describe(scaling: RopeScaling) -> str:
    if scaling.method == "none":
        return f"no scaling, context {scaling.original_context}"
    return (
        f"{scaling.method} factor {scaling.factor:g}, context {scaling.original_context} -> {scaling.extended_context}, "
        f"attention factor {scaling.attention_factor:.4f}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge convert`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with config.json, weights and tokenizer")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.gguf", help="{quant} in it becomes the type's name"
    )
    add_recipe_flags(parser)
    add_planner_flags(parser)
    add_scaling_flags(parser, "on top of config.json, or YaRN for a plain checkpoint")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge convert`."""
    job = plan_files_of(
        args.checkpoint,
        args.output,
        args.quant,
        imatrix=args.imatrix,
        choice=choice_of(args),
        force=args.force,
        overrides=scaling_overrides(args),
        planner=planner_options(args),
        kernels=args.kernels,
    )
    return carry_out(job.source, job.files, args, lambda: job.make(args.threads, args.force))
