"""What becomes of a checkpoint, decided and checked before a weight is read: its positions and tensors (`source_model`), and its
tokenizer, which is proved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge import __version__
from yarn_edge.checkpoint.adapter import MERGED
from yarn_edge.checkpoint.tokenizer import Reference
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import EXACT, NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.gguf.header import pack_key
from yarn_edge.gguf.read import DEFAULT_ALIGNMENT, read_gguf
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.description import canonical_keys
from yarn_edge.llama_rules.ends import token_names
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.planner import RopePlan
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import Encode, check_tokens, reference_encoder

from .adapters.requests import AdaptedCheckpoint
from .adapters.told import merged_lines
from .checkpoint import Checkpoint
from .families.architectures import hyper_parameters
from .families.rows import Architecture, TensorRow
from .families.sizes import ModelSizes
from .file_plan import Source
from .one_pass import SourceTensor
from .row_reader import source_tensor
from .source_model import open_source_model
from .vocab import Vocabulary, read_vocabulary
from .vocab_proof import UnprovedTokenizer, prove, remembered


@dataclass(frozen=True)
class ConversionPlan:
    """Everything about a conversion that is known before any weight is read.

    encode: the ids of `reference`, which remembers those of the proof. proved: whether all texts were compared; otherwise
    `check_header` does that. keys: without the vocabulary's.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    sizes: ModelSizes
    scaling: RopeScaling
    rope: RopePlan
    reference: Reference
    encode: Encode
    vocabulary: Vocabulary
    rows: list[TensorRow]
    keys: dict[str, Any]
    proved: bool

    @property
    def scaling_summary(self) -> str:
        """The scaling in a few words."""
        s, short = self.scaling, self.rope.short
        if short is not None:
            return (
                f"LongRoPE, one table for contexts up to {short.runs.original_context} and one for those up to {s.original_context}, "
                f"attention factor {s.attention_factor:.4f}"
            )
        if s.method == "none":
            return f"no scaling, context {s.original_context}"
        return (
            f"{s.method} factor {s.factor:g}, context {s.original_context} -> {s.extended_context}, "
            f"attention factor {s.attention_factor:.4f}"
        )


def plan_conversion(
    checkpoint: Path | AdaptedCheckpoint,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    proved: bool = True,
    remote: RemoteWeights | None = None,
) -> ConversionPlan:
    """Read and check everything but the weights' values. Raises YarnEdgeError for anything that cannot be carried over.

    remote: those of the folder's files that are on the Hub. proved: prove the tokenizer now; otherwise its name in llama.cpp is
    chosen by few texts, and `check_header` proves it.
    """
    model = open_source_model(checkpoint, overrides, planner, remote)
    row, config, sizes, scaling, rope_plan = model.architecture, model.config, model.sizes, model.scaling, model.rope
    folder, quantization = model.checkpoint.path, model.checkpoint.quantization
    for text in merged_lines(model.adapted.adapters) if model.adapted else ():
        note(text)
    reference = reference_encoder(model.tokenizer)
    encode = remembered(reference)
    vocabulary = prove(read_vocabulary(folder, sizes.vocab, reference), folder, reference, encode, proved)
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": one_line(model.name, 200),
        "yarn_edge.version": __version__,
        **({"yarn_edge.source_quantization": quantization} if quantization else {}),
        **({MERGED: model.adapted.names} if model.adapted else {}),
        **hyper_parameters(row, config, sizes, scaling.extended_context),
        **rope_plan.keys,
        **({} if rope_plan.short else canonical_keys(scaling, rope_plan.form, rope_plan.sliding)),
    }
    return ConversionPlan(
        model.checkpoint, row, sizes, scaling, rope_plan, reference, encode, vocabulary, model.rows, keys, proved
    )


def tell(plan: ConversionPlan, gaps: Iterable[str] = ()) -> None:
    """What users should know of a plan whose tokenizer is proved. gaps: those that `check_header` found."""
    for text in (*plan.vocabulary.notes, *gaps):
        note(f"note: {text}")
    note(f"{plan.architecture.hf_name}: {plan.scaling_summary}; tokenizer {plan.vocabulary.pre}, proved")


def checkpoint_source(plan: ConversionPlan) -> Source:
    """The checkpoint as a source to quantize: its tensors under their GGUF names, its keys packed.

    llama.cpp's recipe starts from what its own converter would write: vectors and routers in float32, matrices in their own type.
    What is quantized in the checkpoint has a type of ggml with the same bits, and keeps it.
    """
    tensors = [source_tensor(plan.checkpoint, row, plan.sizes) for row in plan.rows]
    plain = {row.target for row in plan.rows if row.float32}
    declared = {t.name: type_named("F32") if len(t.ne) == 1 or t.name in plain else t.kind for t in tensors}
    for name, factors in plan.rope.tensors.items():
        tensors.append(_factors_tensor(name, factors))
        declared[name] = tensors[-1].kind
    keys = {"general.architecture": plan.architecture.gguf, **plan.keys}
    entries = {key: pack_key(key, value) for key, value in keys.items()} | plan.vocabulary.entries()
    checkpoint = plan.checkpoint
    kept = frozenset(t.name for t in tensors if not t.kind.is_float)
    remote = checkpoint.remote if checkpoint.remote and checkpoint.remote.opened else None
    return Source(
        checkpoint.path, entries, tensors, declared, DEFAULT_ALIGNMENT, checkpoint.check_unchanged, kept, remote
    )


def _factors_tensor(name: str, factors: npt.NDArray[np.float32]) -> SourceTensor:
    def read(_first_row: int, out: npt.NDArray[np.uint8]) -> None:
        out[0] = factors.view(np.uint8)

    return SourceTensor(name, factors.shape, type_named("F32"), read, name)


def check_header(plan: ConversionPlan, path: Path) -> tuple[str, ...]:
    """Load a file's header in llama.cpp and check its token ids and ends, and ggml's kernel at the positions that it is to have.

    Returns the known gaps that the ids show. Raises YarnEdgeError for the first that differs from the checkpoint; UnprovedTokenizer
    for ids, if the plan is not proved.
    """
    from yarn_edge.verify.checks import check_kernel  # here it is loaded while tensors are made

    with Model(path, vocab_only=True) as model:
        compared = check_tokens(model, plan.reference, plan.encode)
        endless = [token for token in plan.vocabulary.ends if not model.is_end(token)]
    for _, runs in _expected(plan):
        kernel = check_kernel(runs, runs, plan.architecture.gguf)
        if kernel.status != "pass":
            raise YarnEdgeError(f"{path}: ggml's RoPE kernel computes other positions on this machine: {kernel.detail}")
    if compared.mismatch is not None:
        kind = YarnEdgeError if plan.proved else UnprovedTokenizer
        raise kind(f"{path}: the written file tokenizes differently from the checkpoint: {compared.mismatch}")
    if endless:
        raise YarnEdgeError(
            f"{path}: the written file would not end answers at {token_names(plan.vocabulary.tokens, endless)}"
        )
    return compared.notes


def check_positions(plan: ConversionPlan, path: Path) -> None:
    """Read a written file back and check its positions by llama.cpp's rules, and its description of them.

    Raises YarnEdgeError if they are not the checkpoint's.
    """
    file = FilePositions(read_gguf(path, vocabulary=False))
    described = plan.scaling if plan.rope.short is None else None
    for n_ctx, wanted in _expected(plan):
        positions = file.at(n_ctx)
        if angle_error(positions.runs, wanted).any_difference or positions.canonical != described:
            raise YarnEdgeError(f"{path}: the written file would not run with the checkpoint's positions")


def _expected(plan: ConversionPlan) -> list[tuple[int | None, RopeScaling]]:
    """Sizes of a context with the positions that are to run there; None for any."""
    if plan.rope.short is None:
        return [(None, plan.rope.runs)]
    origin = plan.rope.short.runs.original_context
    return [(origin, plan.rope.short.runs), (origin + 1, plan.rope.runs)]
