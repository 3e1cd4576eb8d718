"""A checkpoint's tensors as the rows of its family want them: every one is used, and of the right shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, shown
from yarn_edge.checkpoint.layers import MAX_LAYERS
from yarn_edge.checkpoint.quantized import refuse_quantized
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling

from .checkpoint import Checkpoint, same_values
from .families.architectures import tensor_rows, unknown_tensor
from .families.rows import Architecture, TensorRow, Wrapper
from .families.sizes import ModelSizes
from .stored import DTYPES, Tensor

_HEAD = "lm_head.weight"


def language_model(checkpoint: Checkpoint, wrapper: Wrapper | None) -> Checkpoint:
    """The checkpoint without what is around its language model, with a note about it."""
    if wrapper is None:
        return checkpoint
    tensors: dict[str, Tensor] = {}
    left_out: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        known = name_inside(wrapper, name)
        if known is None:
            outside = next(start for start in wrapper.left_out if name.startswith(start))
            left_out[outside.removeprefix("model.").removesuffix(".")] += 1
            continue
        if known in tensors:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensors {one_line(tensors[known].name, 100)} and {one_line(tensor.name, 100)} are both "
                f"{one_line(known, 100)} of the language model: remove one of them"
            )
        tensors[known] = tensor
    parts = ", ".join(f"{name} ({n} tensors)" for name, n in left_out.items())
    notes = [f"note: only the language model is converted; left out: {parts}"] if parts else []
    notes += [f"note: the file is for text alone: {wrapper.text_alone}"] if wrapper.text_alone else []
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, *notes))


def without_prediction(checkpoint: Checkpoint, row: Architecture, config: ConfigFile) -> Checkpoint:
    """The checkpoint without tensors that predict further tokens, with a note about them."""
    if not row.prediction and not row.prediction_layers:
        return checkpoint
    n_layer, key = config.required_integer("num_hidden_layers"), row.prediction_layers
    n = config.values.get(key) or 0
    if not is_whole(n) or not 0 <= n <= MAX_LAYERS:
        raise config.error(key, f"is {shown(n)}, expected a whole number from 0 to {MAX_LAYERS}")
    starts = (*row.prediction, *(f"model.layers.{n_layer + i}." for i in range(int(n))))
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith(starts)}
    if len(kept) == len(checkpoint.tensors):
        return checkpoint
    text = f"note: left out: {len(checkpoint.tensors) - len(kept)} tensors of layers that predict further tokens"
    return replace(checkpoint, tensors=kept, notes=(*checkpoint.notes, text))


def name_inside(wrapper: Wrapper | None, name: str) -> str | None:
    """The name of a tensor without what is around the language model; None for one that is not in it."""
    if wrapper is None:
        return name
    if name.startswith(wrapper.left_out):
        return None
    old, new = next((pair for pair in wrapper.names if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


def check_counts(checkpoint: Checkpoint, row: Architecture, config: ConfigFile) -> None:
    """Raise YarnEdgeError for more layers or experts than the tensors can be for, before a name is made for each.

    A layer has tensors of its own, and the router a row for each expert.
    """
    tensors = checkpoint.tensors
    longest = max((n for tensor in tensors.values() for n in tensor.shape), default=0)
    limits = {"num_hidden_layers": (len(tensors), f"it has {len(tensors)} tensors")}
    experts = row.sizes["experts"].keys if "experts" in row.sizes else ()
    limits |= dict.fromkeys(experts, (longest, f"no dimension of a tensor is above {longest}"))
    for key, (limit, why) in limits.items():
        count = config.integer(key)
        if count is not None and count > limit:
            raise config.error(key, f"is {count}, more than {checkpoint.path} can hold ({why}): correct it")


def match_tensors(
    checkpoint: Checkpoint, row: Architecture, sizes: ModelSizes, scaling: RopeScaling
) -> list[TensorRow]:
    """The rows to write. Every tensor of the checkpoint must be used and have the shape that the config implies."""
    rows = tensor_rows(row, checkpoint.config, sizes)
    tensors = checkpoint.tensors
    embeddings = next(r.source for r in rows if r.target == "token_embd.weight")
    if embeddings not in tensors and _HEAD in tensors and _HEAD not in {r.source for r in rows}:
        # Of tied weights one name is saved, whichever; transformers takes it for both.
        rows = [replace(r, source=_HEAD) if r.source == embeddings else r for r in rows]
    rows = [_as_saved(r, sizes, checkpoint) for r in rows]
    used = {source for r in rows for source in r.sources(sizes)}
    without = {tensor.name: tensor.dtype for name, tensor in tensors.items() if name not in used}
    refuse_quantized(checkpoint.config, str(checkpoint.path), without, DTYPES)
    for r in rows:
        _check_sources(checkpoint, r, sizes)
    for name, tensor in tensors.items():
        if name in used:
            continue
        if name.endswith("rotary_emb.inv_freq"):
            _check_inv_freq(checkpoint, tensor, scaling)
        elif name == _HEAD:
            if not same_values(tensor, tensors[embeddings]):
                raise YarnEdgeError(
                    f"{checkpoint.path}: lm_head.weight differs from the embeddings, but config.json ties them "
                    "(tie_word_embeddings): correct one of them"
                )
        else:
            raise unknown_tensor(str(checkpoint.path), tensor.name)
    return rows


def _as_saved(row: TensorRow, sizes: ModelSizes, checkpoint: Checkpoint) -> TensorRow:
    """The row in the layout that the checkpoint has. Raises YarnEdgeError if two layouts have one name and one shape."""
    other, tensors = row.other, checkpoint.tensors
    if other is None or next(other.sources(sizes)) not in tensors:
        return row
    saved = tensors.get(next(row.sources(sizes)))
    if saved is None:
        return other
    if other.source != row.source:
        return row
    if row.disk_shape(sizes) == other.disk_shape(sizes):
        raise YarnEdgeError(
            f"{checkpoint.path}: tensor {row.source} has the shape {list(saved.shape)}, which does not tell whether its matrices are "
            "transposed: published checkpoints have them so, those of transformers 5 do not. It cannot be converted"
        )
    return other if saved.shape == other.disk_shape(sizes) else row


def _check_sources(checkpoint: Checkpoint, row: TensorRow, sizes: ModelSizes) -> None:
    """Raise YarnEdgeError unless all tensors of a row are there, with one shape and one type."""
    tensors, expected = checkpoint.tensors, row.disk_shape(sizes)
    first = next(row.sources(sizes))
    for source in row.sources(sizes):
        if source not in tensors:
            raise YarnEdgeError(f"{checkpoint.path}: tensor {source} is missing{_similar(source, tensors)}")
        if tensors[source].shape != expected:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {source} has the shape {list(tensors[source].shape)}, but config.json implies "
                f"{list(expected)}"
            )
        if tensors[source].dtype != tensors[first].dtype:
            raise YarnEdgeError(
                f"{checkpoint.path}: tensor {source} is {tensors[source].dtype}, but {first} is "
                f"{tensors[first].dtype}: save all experts of a layer in one type"
            )


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
