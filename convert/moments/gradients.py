"""How much each result of a model's matrices matters: gradients of its own predictions, by one backward pass in transformers.

With labels drawn from the model's own distribution, the second moment of a result's gradient is the diagonal of the Fisher information:
an error d of that result costs about G d² / 2 nats of KL for each token. Layers run again in the backward pass, one after the
other, so that a streamed model holds the weights of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import bar
from yarn_edge.verify.transformers_reference import open_reference

WINDOW, TOKENS = 512, 2048  # of one pass, and of all; the sensitivities hardly depend on the text
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gradients:
    """rows: mean squares of the gradients of a matrix's results, (n,), by the name of its weight from "layers." on. head: the same for
    the output matrix; head_moments: second moments of its inputs, (hidden, hidden). embedding: for the columns of the embeddings.
    """

    rows: dict[str, Doubles]
    head: Doubles
    head_moments: npt.NDArray[np.float32]
    embedding: Doubles


class _Sums:
    """What hooks add up."""

    def __init__(self, model: Any) -> None:
        self.rows: dict[str, Any] = {}
        self.head: Any = 0.0
        self.head_moments: Any = 0.0
        self.embedding: Any = 0.0
        self._model = model

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all matrices of layers, on the head and on the embeddings."""
        from torch.nn import Linear

        head = self._model.get_output_embeddings()
        handles = [
            head.register_forward_hook(self._on_head),
            self._model.get_input_embeddings().register_forward_hook(self._on_embeddings),
        ]
        for name, module in self._model.named_modules():
            if isinstance(module, Linear) and "layers." in name:
                key = name[name.index("layers.") :] + ".weight"
                handles.append(module.register_forward_hook(self._adding_to(key)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adding_to(self, key: str) -> Any:
        def see(_module: Any, _inputs: Any, result: Any) -> None:
            if result.requires_grad:  # not in the first pass, whose results are not kept
                result.register_hook(lambda g: self._add(key, g))

        return see

    def _add(self, key: str, gradient: Any) -> None:
        squares = gradient.flatten(0, -2).double().square().sum(0)
        self.rows[key] = self.rows.get(key, 0.0) + squares

    def _on_head(self, _module: Any, inputs: Any, result: Any) -> None:
        x = inputs[0].detach().flatten(0, -2)
        self.head_moments = self.head_moments + x.T @ x

        def see(gradient: Any) -> None:
            self.head = self.head + gradient.flatten(0, -2).double().square().sum(0)

        result.register_hook(see)

    def _on_embeddings(self, _module: Any, _inputs: Any, result: Any) -> Any:
        result.requires_grad_(True)

        def see(gradient: Any) -> None:
            self.embedding = self.embedding + gradient.flatten(0, -2).double().square().sum(0)

        result.register_hook(see)
        return result


def output_gradients(folder: Path, windows: Sequence[Sequence[int]]) -> Gradients:
    """The gradients of the checkpoint in `folder` over windows of tokens, each cut to WINDOW, TOKENS in all.

    Raises YarnEdgeError if transformers cannot run it.
    """
    import torch

    parts = [list(window[:WINDOW]) for window in windows]
    parts = parts[: max(1, TOKENS // len(parts[0]))]
    n_tokens = sum(map(len, parts))
    drawn = torch.Generator().manual_seed(0)
    with open_reference(folder) as model:
        if model.get_output_embeddings() is None:
            raise YarnEdgeError(f"{folder}: transformers knows no output matrix of it")
        model.train()  # only so do layers run again in the backward pass; there is no dropout at inference
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        sums = _Sums(model)
        with sums.hooked(), bar("Sensitivities", n_tokens, "tokens") as advance:
            for part in parts:
                logits = model(torch.tensor([part]), use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn)[:, 0]
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                advance(len(part))
    scale = 1 / n_tokens
    return Gradients(
        {name: (value * scale).numpy() for name, value in sums.rows.items()},
        (sums.head * scale).numpy(),
        (sums.head_moments * scale).float().numpy(),
        (sums.embedding * scale).numpy(),
    )
