"""How much each result of a model's matrices matters: gradients of its own predictions, by one backward pass in transformers.

With labels drawn from the model's own distribution, the second moment of a result's gradient is the diagonal of the Fisher information:
an error d of that result costs about G d² / 2 nats of KL for each token. The model is streamed: layers run again in the backward pass,
one after the other, so that the weights of one are in memory; and the head computes some tokens at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import Advance, bar, note
from yarn_edge.runtime.machine import map_large_blocks
from yarn_edge.verify.transformers_reference import open_differentiable

from .hooks import GradientSums
from .resumed import load_progress_arrays, save_progress_arrays

WINDOW, TOKENS = 512, 2048  # of one pass, and of all; the sensitivities hardly depend on the text
_TOGETHER = 2  # windows that go through a layer together, with its weights read once
_HEAD_TOKENS = 256  # whose logits are in memory at a time
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gradients:
    """rows: mean squares of the gradients of a matrix's results, (n,), by the name of its weight from "layers." on; of experts
    (experts, n), as means over all tokens. head: the same for the output matrix; head_moments: second moments of its inputs,
    (hidden, hidden). embedding: second moments of the gradients of the embeddings, (hidden, hidden). tokens: of which all these are.
    """

    rows: Mapping[str, Doubles]
    head: Doubles
    head_moments: npt.NDArray[np.float32]
    embedding: npt.NDArray[np.float32]
    tokens: int


def output_gradients(folder: Path, windows: Sequence[Sequence[int]], kept: Path | None = None) -> Gradients:
    """The gradients of the checkpoint in `folder` over windows of tokens, each cut to WINDOW, TOKENS in all.

    kept: a file for what a run that is ended has so far, from which the next goes on. Raises YarnEdgeError if transformers cannot
    run it.
    """
    length = min(WINDOW, *map(len, windows))
    parts = [list(window[:length]) for window in windows][: max(1, TOKENS // length)]
    n_tokens = sum(map(len, parts))
    identity = hashlib.sha256(f"{folder.resolve()} {parts}".encode()).hexdigest()
    map_large_blocks()
    with open_differentiable(folder) as model:
        if model.get_output_embeddings() is None:
            raise YarnEdgeError(f"{folder}: transformers knows no output matrix of it")
        sums = GradientSums(model)
        done = _load(sums, kept, identity)
        with sums.hooked(), bar("Sensitivities", n_tokens, "tokens") as advance:
            advance(done * length)
            while done < len(parts):
                batch = parts[done : done + _TOGETHER]
                _backward(model, batch, done, advance)
                done += len(batch)
                if kept is not None:
                    save_progress_arrays(kept, {"identity": identity, "done": done}, sums.arrays())
    found = {name: value / n_tokens for name, value in sums.arrays().items()}
    head, moments, embedding = (found.pop(name) for name in ("head", "head moments", "embedding"))
    return Gradients(found, head, moments.astype(np.float32), embedding.astype(np.float32), n_tokens)


def _load(sums: GradientSums, kept: Path | None, identity: str) -> int:
    """The number of windows that an earlier run finished."""
    found = None if kept is None else load_progress_arrays(kept)
    if found is None or found[0].get("identity") != identity:
        return 0
    sums.begin(found[1])
    note("note: an earlier run has some of the sensitivities: going on from there")
    return int(found[0]["done"])


def _backward(model: Any, batch: Sequence[Sequence[int]], number: int, advance: Advance) -> None:
    """One pass over some windows, of which the first has this number."""
    import torch

    drawn = torch.Generator().manual_seed(number)
    output = model.base_model(torch.tensor(batch), use_cache=False)
    state = output.last_hidden_state
    flat = state.detach().reshape(1, -1, state.shape[-1]).requires_grad_(True)
    with _without_layers(model, type(output)) as run_on:
        for first in range(0, flat.shape[1], _HEAD_TOKENS):
            run_on(flat[:, first : first + _HEAD_TOKENS])
            ids = torch.zeros((1, min(_HEAD_TOKENS, flat.shape[1] - first)), dtype=torch.long)
            logits = model(ids, use_cache=False).logits[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    state.backward(flat.grad.view_as(state))
    advance(sum(map(len, batch)))


@contextmanager
def _without_layers(model: Any, output: Any) -> Iterator[Callable[[Any], None]]:
    """In the block the model computes logits, as its family does, from a last state of the layers that is given. output: their class."""
    inner, given = model.base_model, list[Any]()
    inner.forward = lambda *_arguments, **_others: output(last_hidden_state=given[-1])
    try:
        yield given.append
    finally:
        del inner.forward
