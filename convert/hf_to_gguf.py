"""`yarn-edge convert`: a Hugging Face checkpoint becomes quantized GGUF files, or nothing.

Order of work: read the config into a RopeScaling and ask the simulation of llama.cpp whether a GGUF can carry it; match
every tensor of the checkpoint with a row of the family; prove the tokenizer; only then write.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge import __version__, ggml, rope
from yarn_edge.checks import check_kernel
from yarn_edge.config_scaling import read_scaling
from yarn_edge.dialects import head_dim
from yarn_edge.effective import angle_error, effective
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import add_planner_flags, add_scaling_flags, add_threads_flag, scaling_overrides
from yarn_edge.metadata import canonical, canonical_keys, explicit_arguments
from yarn_edge.planner import Bake, RopePlan, plan_rope
from yarn_edge.progress import bar, note
from yarn_edge.reference_tokenizer import Reference
from yarn_edge.runtime import Model
from yarn_edge.scaling import RopeScaling
from yarn_edge.tokenizer_check import check_tokens, reference_encoder

from .architectures import (
    TRANSFORMS,
    Architecture,
    Sizes,
    TensorRow,
    architecture_of,
    check_sliding_window,
    hyper_parameters,
    same_bits,
    sizes_of,
    tensor_rows,
    unknown_tensor,
)
from .checkpoint import Checkpoint, Tensor, open_checkpoint
from .quantize import Quant, known_quants, parse_quants, quantize_file
from .vocab import Vocabulary, prove, read_vocabulary
from .writer import CHUNK_BYTES, TensorPlan, check_output, check_space, partial_file, publish, write_gguf

QUANTIZATION_VERSION = 2  # ggml.h: GGML_QNT_VERSION
_ELEMENT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
Q8_LARGEST = 65504.0 * 127  # a block's scale is its largest value / 127, in half precision
_Q8_BLOCK, _Q8_BLOCK_BYTES, _Q8_TYPE = 32, 34, 8


@dataclass(frozen=True)
class Plan:
    """Everything about a conversion that is known before a weight is read."""

    checkpoint: Checkpoint
    architecture: Architecture
    sizes: Sizes
    scaling: RopeScaling
    rope: RopePlan
    reference: Reference
    vocabulary: Vocabulary
    rows: list[TensorRow]
    keys: dict[str, Any]


def plan_conversion(
    folder: Path,
    overrides: Mapping[str, Any],
    *,
    freeze_at: int | None = None,
    bake: Bake = "auto",
    allow_approximate: bool = False,
) -> Plan:
    """Read and check all but the weights' values. Raises YarnEdgeError for whatever cannot be carried over."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    row = architecture_of(config)
    scaling = read_scaling(config, overrides, freeze_at)
    if scaling.dim != head_dim(config):
        raise YarnEdgeError(
            f"{scaling.source('dim')}: {scaling.dim} of {head_dim(config)} dimensions are rotated; llama.cpp runs {row.gguf} "
            "only where all are"
        )
    rope_plan = plan_rope(scaling, row.gguf, bake=bake, allow_approximate=allow_approximate)
    if rope_plan.told:
        note(rope_plan.told)
    check_sliding_window(row, config, scaling)
    sizes = sizes_of(row, config)
    rows = _match_tensors(checkpoint, row, sizes, scaling)
    reference = reference_encoder(folder)
    vocabulary = prove(read_vocabulary(folder, sizes.vocab, reference), folder, reference)
    for text in vocabulary.notes:
        note(f"note: {text}")
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": one_line(_model_name(folder), 200),
        "general.quantization_version": QUANTIZATION_VERSION,
        "yarn_edge.version": __version__,
        **hyper_parameters(row, config, sizes, scaling.extended_context),
        **rope_plan.keys,
        **canonical_keys(scaling, rope_plan.form),
        **vocabulary.keys(),
    }
    return Plan(checkpoint, row, sizes, scaling, rope_plan, reference, vocabulary, rows, keys)


def _model_name(folder: Path) -> str:
    """The folder's name; in the layout of the Hugging Face cache (models--ORG--NAME/snapshots/HASH) the model's."""
    folder = folder.absolute()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.split("--")[-1] if cached else folder.resolve().name


def _match_tensors(checkpoint: Checkpoint, row: Architecture, sizes: Sizes, scaling: RopeScaling) -> list[TensorRow]:
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
            if not same_bits(tensor.raw, tensors["model.embed_tokens.weight"].raw):
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


def _type_for(shape: tuple[int, ...], quant: str) -> str:
    """The type of one tensor in a direct file: vectors stay float32; rows that Q8_0 cannot hold become F16."""
    if len(shape) == 1:
        return "F32"
    return "F16" if quant == "Q8_0" and shape[-1] % _Q8_BLOCK else quant


def _n_bytes(shape: tuple[int, ...], type_name: str) -> int:
    n = math.prod(shape)
    return n // _Q8_BLOCK * _Q8_BLOCK_BYTES if type_name == "Q8_0" else n * _ELEMENT_BYTES[type_name]


def _chunks(plan: Plan, row: TensorRow, type_name: str) -> Iterator[npt.NDArray[Any]]:
    """The bytes of one tensor in its new type, some rows at a time."""
    tensor = plan.checkpoint.tensors[row.source]
    raw = TRANSFORMS[row.transform](plan.sizes, tensor.raw)
    whole = Tensor(tensor.name, tensor.dtype, raw)
    step = max(1, CHUNK_BYTES // max(1, 4 * math.prod(raw.shape[1:])))
    for start in range(0, raw.shape[0], step):
        values = whole.float32(start, start + step)
        if not np.isfinite(values).all():
            raise YarnEdgeError(f"{plan.checkpoint.path}: tensor {row.source} has values that are not finite numbers")
        if tensor.dtype == type_name:
            yield raw[start : start + step]
        elif type_name == "F32":
            yield values
        elif type_name == "BF16":
            yield ggml.bfloat16(values)
        elif type_name == "Q8_0":
            if np.abs(values).max(initial=0) > Q8_LARGEST:
                raise YarnEdgeError(
                    f"{plan.checkpoint.path}: tensor {row.source} has values above {Q8_LARGEST:g}, whose scale Q8_0 cannot hold"
                )
            yield ggml.quantize_rows(values, _Q8_TYPE)
        else:
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if not np.isfinite(half).all():
                raise YarnEdgeError(
                    f"{plan.checkpoint.path}: tensor {row.source} has values above 65504, which F16 cannot hold: use BF16"
                )
            yield half


def _tensor_plans(plan: Plan, quant: str) -> list[TensorPlan]:
    found = []
    for row in plan.rows:
        shape = plan.checkpoint.tensors[row.source].shape
        kind = _type_for(shape, quant)
        found.append(
            TensorPlan(row.target, shape, kind, _n_bytes(shape, kind), lambda r=row, k=kind: _chunks(plan, r, k))  # type: ignore[misc]
        )
    factors = plan.rope.factors
    if factors is not None:
        found.append(TensorPlan("rope_freqs.weight", factors.shape, "F32", factors.nbytes, lambda: iter([factors])))
    return found


def _write_direct(plan: Plan, quant: Quant, path: Path) -> None:
    tensors = _tensor_plans(plan, quant.name)
    total = sum(t.n_bytes for t in tensors)
    check_space(path.parent, total, f"the {quant.name} file")
    keys = {**plan.keys, "general.file_type": quant.ftype}
    with bar(f"Writing {quant.name}", total, "bytes") as advance:
        write_gguf(path, plan.architecture.gguf, keys, tensors, advance)


def _source_precision(plan: Plan) -> str:
    """The type in which an intermediate file loses nothing of the checkpoint."""
    dtypes = {plan.checkpoint.tensors[row.source].dtype for row in plan.rows if len(row.shape) > 1}
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _check_result(plan: Plan, path: Path) -> None:
    """Read the written file back: its positions by llama.cpp's rules, its description, its token ids."""
    with Model(path, vocab_only=True) as model:
        mismatch = check_tokens(model, plan.reference).mismatch
    runs = effective(model.gguf, explicit_arguments(model.gguf))
    if angle_error(runs, plan.rope.runs).any_difference or canonical(model.gguf) != plan.scaling:
        raise YarnEdgeError(f"{path}: the written file would not run the checkpoint's positions")
    kernel = check_kernel(runs, runs, plan.architecture.gguf)
    if kernel.status != "pass":
        raise YarnEdgeError(f"{path}: ggml's rope kernel computes other positions here: {kernel.detail}")
    if mismatch is not None:
        raise YarnEdgeError(f"{path}: the written file tokenizes otherwise than the checkpoint: {mismatch}")


def output_paths(output: str, quants: list[Quant]) -> dict[str, Path]:
    """Quant name -> output file; `{quant}` in the name is filled in, and needed for several types."""
    if not output:
        raise YarnEdgeError("-o is empty; give the name of a file")
    if len(quants) > 1 and "{quant}" not in output:
        raise YarnEdgeError(f"-o {output}: {len(quants)} types were asked for, so the name must hold {{quant}}")
    return {q.name: Path(output.replace("{quant}", q.name)) for q in quants}


def convert(
    checkpoint: str | Path,
    output: str,
    quant: str = "Q4_K_M",
    *,
    force: bool = False,
    threads: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    freeze_at: int | None = None,
    bake: Bake = "auto",
    allow_approximate: bool = False,
) -> list[Path]:
    """Convert a checkpoint folder. Returns the files written, one for each type in `quant` (comma-separated).

    overrides: RopeScaling fields by name, on top of config.json; freeze_at: the length, in tokens, whose angles a dynamic
    scaling gets; bake, allow_approximate: see `yarn_edge.planner`. Raises YarnEdgeError when anything cannot be carried
    over exactly; each file is whole or not there, and files that were finished before an error stay.
    """
    quants = parse_quants(quant)
    paths = output_paths(output, quants)
    folder = Path(checkpoint)
    sources = list(folder.iterdir()) if folder.is_dir() else []
    paths = {name: check_output(path, force, sources) for name, path in paths.items()}
    plan = plan_conversion(folder, overrides or {}, freeze_at=freeze_at, bake=bake, allow_approximate=allow_approximate)
    note(f"{plan.architecture.hf_name}: {_describe(plan.scaling)}; tokenizer {plan.vocabulary.pre}, proved")
    done: list[Path] = []
    with ExitStack() as stack:
        intermediate: Path | None = None
        for q in quants:
            path = paths[q.name]
            with partial_file(path) as partial:
                if q.is_direct:
                    _write_direct(plan, q, partial)
                else:
                    if intermediate is None:
                        intermediate = stack.enter_context(partial_file(path, ".source"))
                        _write_direct(plan, known_quants()[_source_precision(plan)], intermediate)
                    check_space(path.parent, intermediate.stat().st_size // 8, f"the {q.name} file")
                    quantize_file(intermediate, partial, q, threads)
                _check_result(plan, partial)
                publish(partial, path, force)
            note(f"{path}: {q.name}, {path.stat().st_size / 1e6:.1f} MB")
            done.append(path)
    return done


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
    parser.add_argument("--quant", default="Q4_K_M", metavar="TYPE[,TYPE…]", help="llama.cpp names (default: Q4_K_M)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    add_threads_flag(parser)
    add_planner_flags(parser)
    add_scaling_flags(parser, "on top of config.json, or YaRN for a plain checkpoint")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge convert`."""
    convert(
        args.checkpoint, args.output, args.quant, force=args.force, threads=args.threads, overrides=scaling_overrides(args),
        freeze_at=args.freeze_at, bake=args.bake_rope, allow_approximate=args.allow_approximate_rope,
    )  # fmt: skip
    return 0
