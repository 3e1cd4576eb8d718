"""What becomes of a checkpoint, decided and checked before a weight is read.

Order of work: read the config into a RopeScaling and ask the simulation of llama.cpp whether a GGUF can carry it; match
every tensor of the checkpoint with a row of the family; prove the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge import __version__
from yarn_edge.checkpoint.dialects import head_dim
from yarn_edge.checkpoint.read import only_scaling, read_positions
from yarn_edge.checkpoint.tokenizer import Reference
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import EXACT, NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.gguf.header import pack_key
from yarn_edge.gguf.read import DEFAULT_ALIGNMENT
from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.effective import FREQUENCY_FACTORS, angle_error
from yarn_edge.llama_rules.ends import token_names
from yarn_edge.llama_rules.planner import RopePlan, plan_rope
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import check_kernel
from yarn_edge.verify.tokenizer import check_tokens, reference_encoder

from .checkpoint import DTYPES, Checkpoint, Tensor, open_checkpoint, same_values
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
from .file_plan import Source
from .one_pass import SourceTensor
from .vocab import Vocabulary, read_vocabulary
from .vocab_proof import prove

_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion that is known before any weight is read."""

    checkpoint: Checkpoint
    architecture: Architecture
    sizes: ModelSizes
    scaling: RopeScaling
    rope: RopePlan
    reference: Reference
    vocabulary: Vocabulary
    rows: list[TensorRow]
    keys: dict[str, Any]

    @property
    def scaling_summary(self) -> str:
        """The scaling in a few words."""
        s = self.scaling
        if s.method == "none":
            return f"no scaling, context {s.original_context}"
        return (
            f"{s.method} factor {s.factor:g}, context {s.original_context} -> {s.extended_context}, "
            f"attention factor {s.attention_factor:.4f}"
        )


def plan_conversion(
    folder: Path, overrides: ScalingOverrides = NO_OVERRIDES, planner: PlannerOptions = EXACT
) -> ConversionPlan:
    """Read and check everything but the weights' values. Raises YarnEdgeError for anything that cannot be carried over."""
    checkpoint = open_checkpoint(folder)
    for text in checkpoint.notes:
        note(text)
    config = checkpoint.config
    row = architecture_of(config)
    positions = read_positions(config, overrides)
    scaling = only_scaling(config, positions)
    for text in positions.assumptions:
        note(f"note: {text}")
    if scaling.dim != head_dim(config):
        raise YarnEdgeError(
            f"{scaling.source('dim')}: {scaling.dim} of {head_dim(config)} dimensions are rotated, but llama.cpp runs {row.gguf} "
            "only if all are"
        )
    rope_plan = plan_rope(scaling, row.gguf, planner)
    if rope_plan.message:
        note(rope_plan.message)
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
    """The folder's name, or the model's in the layout of the Hugging Face cache (models--ORG--NAME/snapshots/HASH)."""
    folder = folder.absolute()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.split("--")[-1] if cached else folder.resolve().name


def _match_tensors(
    checkpoint: Checkpoint, row: Architecture, sizes: ModelSizes, scaling: RopeScaling
) -> list[TensorRow]:
    """The rows to write. Every tensor of the checkpoint must be used and have the shape that the config implies."""
    rows = tensor_rows(row, checkpoint.config, sizes)
    tensors = checkpoint.tensors
    if _EMBEDDINGS not in tensors and _HEAD in tensors and _HEAD not in {r.source for r in rows}:
        # Of tied weights one name is saved, whichever; transformers takes it for both.
        rows = [replace(r, source=_HEAD) if r.source == _EMBEDDINGS else r for r in rows]
    for r in rows:
        if r.source not in tensors:
            raise YarnEdgeError(f"{checkpoint.path}: tensor {r.source} is missing{_similar(r.source, tensors)}")
        expected = tuple(sizes.dimension(name) for name in r.shape)
        if tensors[r.source].shape != expected:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {r.source} has the shape {list(tensors[r.source].shape)}, but config.json implies "
                f"{list(expected)}"
            )
    used = {r.source for r in rows}
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name.endswith("rotary_emb.inv_freq"):
            _check_inv_freq(checkpoint, tensor, scaling)
        elif name == _HEAD:
            if not same_values(tensor, tensors[_EMBEDDINGS]):
                raise YarnEdgeError(
                    f"{checkpoint.path}: lm_head.weight differs from the embeddings, but config.json ties them "
                    "(tie_word_embeddings): correct one of them"
                )
        else:
            raise unknown_tensor(str(checkpoint.path), tensor.name)
    return rows


def _similar(missing: str, tensors: Mapping[str, Tensor]) -> str:
    """Why a tensor is missing, as far as the names of the others show it."""
    tail = "." + missing.removeprefix("model.")
    for tensor in tensors.values():
        if tensor.name.endswith(tail):
            return f", but {one_line(tensor.name, 100)} is there: rename the tensors as transformers does"
    if missing == _HEAD:
        return (
            ": save the model with its head, or set tie_word_embeddings in config.json if the embeddings are the head"
        )
    return ""


def _check_inv_freq(checkpoint: Checkpoint, tensor: Tensor, scaling: RopeScaling) -> None:
    """A saved frequency buffer is not needed, but if it disagrees with the config, one of the two is wrong."""
    saved = tensor.float32().astype(np.float64)
    rounding = {"F32": 1e-5, "F16": 2e-3, "BF16": 1e-2}[tensor.dtype]
    floor = 1e-7 if tensor.dtype == "F16" else 0.0  # half precision has no smaller numbers
    plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
    for expected in (rope.inv_freq(scaling), plain):
        if saved.shape == expected.shape and bool(np.all(np.abs(saved - expected) <= rounding * expected + floor)):
            return
    raise YarnEdgeError(
        f"{checkpoint.path}: {tensor.name} holds other frequencies than config.json describes (rope_theta, RoPE scaling)"
    )


def checkpoint_source(plan: ConversionPlan) -> Source:
    """The checkpoint as a source to quantize: its tensors under their GGUF names, its keys packed.

    llama.cpp's recipe starts from what its own converter would write: vectors in float32, matrices in their own type.
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
    label = f"{plan.checkpoint.path}: tensor {row.source}"
    item = DTYPES[tensor.dtype][0]

    def read(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        tensor.read(first_row * kind.row_bytes(ne[0]), out.reshape(-1))

    def read_interleaved(first_row: int, out: npt.NDArray[np.uint8]) -> None:
        read(first_row, out)
        rows = out.view(item).reshape(-1) if len(ne) == 1 else out
        rows[:] = interleave(sizes, rows)

    if not row.interleaved:
        return SourceTensor(row.target, ne, kind, read, label)
    return SourceTensor(row.target, ne, kind, read_interleaved, label, 1 if len(ne) == 1 else sizes.head_dim)


def _factors_tensor(factors: npt.NDArray[np.float32]) -> SourceTensor:
    def read(_first_row: int, out: npt.NDArray[np.uint8]) -> None:
        out[0] = factors.view(np.uint8)

    return SourceTensor(FREQUENCY_FACTORS, factors.shape, type_named("F32"), read, FREQUENCY_FACTORS)


def check_written(plan: ConversionPlan, path: Path) -> None:
    """Read a written file back and check its positions by llama.cpp's rules, its description, its token ids and ends.

    Raises YarnEdgeError for the first that differs from the checkpoint.
    """
    with Model(path, vocab_only=True) as model:
        mismatch = check_tokens(model, plan.reference).mismatch
        endless = [token for token in plan.vocabulary.ends if not model.is_end(token)]
    runs = model.positions.runs
    if angle_error(runs, plan.rope.runs).any_difference or model.positions.canonical != plan.scaling:
        raise YarnEdgeError(f"{path}: the written file would not run with the checkpoint's positions")
    kernel = check_kernel(runs, runs, plan.architecture.gguf)
    if kernel.status != "pass":
        raise YarnEdgeError(f"{path}: ggml's RoPE kernel computes other positions on this machine: {kernel.detail}")
    if mismatch is not None:
        raise YarnEdgeError(f"{path}: the written file tokenizes differently from the checkpoint: {mismatch}")
    if endless:
        raise YarnEdgeError(
            f"{path}: the written file would not end answers at {token_names(plan.vocabulary.tokens, endless)}"
        )
