"""What is added up of a transformers model's gradients, by hooks on the results of its matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class GradientSums:
    """Sums of the squares of gradients: by the name of a layer's weight from "layers." on, and for the "head"; of g gᵀ for the
    "embedding"; and "head moments", x xᵀ of the head's inputs.
    """

    def __init__(self, model: Any) -> None:
        self._sums: dict[str, Any] = {}
        self._model = model

    def arrays(self) -> dict[str, Doubles]:
        """The sums so far."""
        return {name: value.numpy() for name, value in self._sums.items()}

    def begin(self, arrays: Mapping[str, Doubles]) -> None:
        """Go on with the sums of an earlier run."""
        import torch

        self._sums = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all matrices of layers, of their experts, on the head and on the embeddings."""
        from torch.nn import Linear

        head = self._model.get_output_embeddings()
        with ExitStack() as stack:

            def hook(handle: Any) -> None:
                stack.callback(handle.remove)

            hook(head.register_forward_hook(self._on_head))
            hook(self._model.get_input_embeddings().register_forward_hook(self._on_embeddings))
            stacked: dict[int, str] = {}
            for name, module in self._model.named_modules():
                if "layers." not in name:
                    continue
                key = name[name.index("layers.") :]
                if isinstance(module, Linear):
                    hook(module.register_forward_hook(self._adding_to(key + ".weight")))
                elif getattr(module, "is_concatenated", False) and not module.is_transposed:
                    module.config._experts_implementation = "eager"  # one expert after another
                    hook(module.register_forward_pre_hook(_noting(key, stacked)))
            stack.enter_context(self._watching_experts(stacked))
            yield

    def _watching_experts(self, stacked: Mapping[int, str]) -> Any:
        """While open, products with a slice of a stacked parameter count for its expert. stacked: their names, by address."""
        from torch.nn.functional import linear
        from torch.overrides import TorchFunctionMode

        def watch(weight: Any, result: Any) -> None:
            name = stacked.get(weight.untyped_storage().data_ptr())
            if name is not None and result.requires_grad:
                n_experts = weight.untyped_storage().nbytes() // (weight.element_size() * weight.numel())
                expert = weight.storage_offset() // weight.numel()
                result.register_hook(lambda gradient: self._add_row(name, expert, n_experts, _squares(gradient)))

        class Watching(TorchFunctionMode):  # type: ignore[misc]
            def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = function(*args, **(kwargs or {}))
                if function is linear and len(args) > 1:
                    watch(args[1], result)
                return result

        return Watching()

    def _add_row(self, key: str, expert: int, n_experts: int, value: Any) -> None:
        if key not in self._sums:
            self._sums[key] = value.new_zeros((n_experts, len(value)))
        self._sums[key][expert] += value

    def _adding_to(self, key: str) -> Any:
        def see(_module: Any, _inputs: Any, result: Any) -> None:
            self._watch(key, result)

        return see

    def _watch(self, key: str, result: Any) -> None:
        if result.requires_grad:  # not in the first pass, whose results are not kept
            result.register_hook(lambda gradient: self._add(key, _squares(gradient)))

    def _add(self, key: str, value: Any) -> None:
        self._sums[key] = self._sums[key] + value if key in self._sums else value

    def _on_head(self, _module: Any, inputs: Any, result: Any) -> None:
        self._add("head moments", _products(inputs[0].detach().flatten(0, -2)))
        self._watch("head", result)

    def _on_embeddings(self, _module: Any, _inputs: Any, result: Any) -> Any:
        result.requires_grad_(True)
        result.register_hook(lambda gradient: self._add("embedding", _products(gradient.flatten(0, -2))))
        return result


def _products(rows: Any) -> Any:
    return (rows.T @ rows).double()


def _squares(gradient: Any) -> Any:
    import torch

    return gradient.flatten(0, -2).square().sum(0, dtype=torch.float64)


def _noting(key: str, stacked: dict[int, str]) -> Any:
    """Before experts run: where their stacked parameters are now."""

    def note_them(module: Any, _inputs: Any) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3:
                stacked[parameter.untyped_storage().data_ptr()] = f"{key}.{name}"

    return note_them
