"""A checkpoint with adapters put on it: the tensors that they change become views, the others stay as they are.

Tied embeddings: an adapter may change the head alone, or the embeddings alone. What ran in training then had two matrices, so
the file gets two. (PEFT's merge writes into the one that both share, which is another model.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.errors import YarnEdgeError, one_line

from ..checkpoint import Checkpoint, same_values
from ..families.rows import Architecture, flag_of
from ..stored import Tensor
from .changes import VOCABULARY, Changes, WeightChange
from .declared import check_declared
from .parts import AdapterParts, read_parts
from .requests import AdapterRequest
from .rows import stored_rows, view_of

EMBEDDINGS, HEAD = VOCABULARY
_TIE = "tie_word_embeddings"
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class AdaptedModel:
    """checkpoint, config: of the language model with the adapters. changes: what they change. tied: whether the base has one
    matrix for embeddings and head. notes: for users.
    """

    checkpoint: Checkpoint
    config: ConfigFile
    adapters: tuple[AdapterParts, ...]
    changes: Changes
    tied: bool
    notes: tuple[str, ...]

    @property
    def names(self) -> str:
        """The adapters' names, with their weights."""
        return one_line(", ".join(parts.request.name for parts in self.adapters), 400)


def with_adapters(
    checkpoint: Checkpoint,
    config: ConfigFile,
    row: Architecture,
    requests: Sequence[AdapterRequest],
    known: Callable[[str], str | None],
) -> AdaptedModel:
    """The language model with the adapters. known: as in `read_parts`.

    Every tensor of an adapter is used, or YarnEdgeError names the first that is not.
    """
    tensors = dict(checkpoint.tensors)
    embeddings = tensors.get(EMBEDDINGS, tensors.get(HEAD))
    tied = flag_of(row, config, _TIE) and embeddings is not None
    both = dict.fromkeys(VOCABULARY, embeddings) if tied and embeddings is not None else {}
    base: dict[str, Tensor] = {**tensors, **both}
    adapters = tuple(read_parts(request, known, base) for request in requests)
    changes = Changes(base, adapters)
    for parts in adapters:
        check_declared(parts, base, tied)
    notes: list[str] = []
    if tied and not changes.keys().isdisjoint(VOCABULARY):
        tensors, config = _with_vocabulary(tensors, base, changes, config, row, notes)
        changed = {name: change for name, change in changes.items() if name not in VOCABULARY}
    else:
        changed = dict(changes)
    for name, change in changed.items():
        tensors[name] = change.applied(base[name])
    _match_experts(tensors, changed)
    rows = tensors[EMBEDDINGS].shape[0] if EMBEDDINGS in changes and EMBEDDINGS in tensors else None
    if rows is not None and rows != config.values.get("vocab_size"):
        notes.append(
            f"note: the adapter brings embeddings of {rows} tokens; the base has {config.values.get('vocab_size')}"
        )
        config = replace(config, values={**config.values, "vocab_size": rows})
    files = (*checkpoint.files, *(file for parts in adapters for file in parts.files))
    checkpoint = replace(checkpoint, tensors=tensors, files=files)
    return AdaptedModel(checkpoint, config, adapters, changes, tied, tuple(notes))


def _with_vocabulary(
    tensors: dict[str, Tensor],
    base: Mapping[str, Tensor],
    changes: Changes,
    config: ConfigFile,
    row: Architecture,
    notes: list[str],
) -> tuple[dict[str, Tensor], ConfigFile]:
    """(tensors, config) with what an adapter makes of tied embeddings: still tied, or two matrices."""
    ours = {name: changes.get(name, WeightChange()) for name in VOCABULARY}
    embeddings, head = ours[EMBEDDINGS], ours[HEAD]
    if embeddings.whole is not None and head.whole is None and EMBEDDINGS in changes.shared:
        head = replace(head, whole=embeddings.whole)
    if embeddings.tokens is not None and head == WeightChange():
        head = embeddings  # peft keeps them tied
    first, second = embeddings.applied(base[EMBEDDINGS]), head.applied(base[HEAD])
    rest = {name: tensor for name, tensor in tensors.items() if name not in VOCABULARY}
    if embeddings is head or same_values(first, second):
        return {**rest, EMBEDDINGS: first}, config
    if _TIE in row.constants or all(r.source != HEAD for r in row.tensors):
        label = (ours[EMBEDDINGS].labels or ours[HEAD].labels)[0]
        raise YarnEdgeError(
            f"{label} changes only one of embeddings and head, which the base ties: llama.cpp has one matrix for both in {row.gguf}"
        )
    notes.append("note: the base ties head and embeddings, and the adapter changes them differently: both are written")
    return {**rest, EMBEDDINGS: first, HEAD: second}, replace(config, values={**config.values, _TIE: False})


def _match_experts(tensors: dict[str, Tensor], changed: Mapping[str, WeightChange]) -> None:
    """Experts are stacked, so where an adapter changes some of a layer, the others become float32, too."""
    stacks = {_EXPERT.sub("*", name) for name in changed if _EXPERT.search(name)}
    if not stacks:
        return
    for name, tensor in tensors.items():
        if _EXPERT.sub("*", name) in stacks and tensor.dtype != "F32":
            tensors[name] = view_of(tensor.name, tensor.shape, stored_rows(tensor))
