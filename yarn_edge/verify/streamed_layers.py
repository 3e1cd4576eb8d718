"""A transformers model of any size in float32: each layer's weights are read before the layer runs, and freed after it.

The model is made by transformers' own from_pretrained, on the meta device: names, shapes, ties and what is missing are judged by
transformers, without any weight in memory. Its own forward runs the layers, and its own loader reads the tensors of one, so that
experts are stacked, masks made and positions given to each layer as ever.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import Advance
from yarn_edge.verify.dequantized import computes_in_floats
from yarn_edge.verify.unloadable import refuse_unloadable

_FLOAT32_BYTES = 4
_MATMUL_SIZE = 1024
_MATMUL_S = 0.05


class LayerFiles:
    """The tensors of a checkpoint's files, and transformers' way of loading them into a model."""

    def __init__(self, files: Sequence[str], load_config: Any) -> None:
        from transformers.modeling_utils import load_state_dict

        self.load_config = load_config
        self._file_of: dict[str, str] = {}
        self._declared: dict[str, Any] = {}
        for file in files:
            names = load_state_dict(file, map_location="meta")
            self._declared |= names
            self._file_of |= dict.fromkeys(names, file)

    def n_bytes(self, name: str) -> int:
        """The size of a tensor in its file, in bytes."""
        return int(self._declared[name].nbytes)

    def declare(self, model: Any) -> Any:
        """Load all tensors without their values. Returns transformers' LoadStateDictInfo."""
        return self._load(model, self._declared, "meta")

    def targets(self, model: Any) -> dict[str, str]:
        """Name in the files -> name in the model, for every tensor that goes there (of several that it becomes, the first)."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rows = self.load_config.weight_mapping or []
        renamings = [row for row in rows if isinstance(row, WeightRenaming)]
        converters = [row for row in rows if isinstance(row, WeightConverter)]
        state, front = model.state_dict(), model.base_model_prefix
        found: dict[str, str] = {}
        for name in self._declared:
            target, _pattern = rename_source_key(name, renamings, converters, front, state)
            if target not in state and name in state:
                target, _pattern = rename_source_key(name, [], [], front, state)
            if target in state:
                found[name] = target
        return found

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor in its file."""
        return list(self._declared[name].shape)

    def load(self, model: Any, names: Sequence[str]) -> Any:
        """Load these tensors of the files into the model. Returns transformers' LoadStateDictInfo."""
        from safetensors import safe_open
        from transformers.modeling_utils import load_state_dict

        with ExitStack() as stack:
            state: dict[str, Any] = {}
            for file in sorted({self._file_of[name] for name in names}):
                here = [name for name in names if self._file_of[name] == file]
                if file.endswith(".safetensors"):
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    state |= {name: opened.get_slice(name) for name in here}
                else:
                    opened = load_state_dict(file)
                    state |= {name: opened[name] for name in here}
            return self._load(model, state, "cpu")

    def _load(self, model: Any, state: Mapping[str, Any], device: str) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model

        config = replace(self.load_config, device_map={"": device})
        return convert_and_load_state_dict_in_model(model=model, state_dict=dict(state), load_config=config)[0]


class StreamedLayers:
    """A model without weights, whose modules get their weights from the files while they run.

    modules: by name. total_bytes: float32 weights that are read in a run. peak_bytes: memory for those of one module while they are read.
    """

    def __init__(self, folder: Path, model: Any, files: LayerFiles) -> None:
        self.model = model
        self._folder, self._files = folder, files
        self.modules = dict(_modules(model))
        same: dict[int, list[str]] = {}
        values = model.state_dict(keep_vars=True)
        for name, value in values.items():
            same.setdefault(id(value), []).append(name)
        self._tied = {name: names for names in same.values() for name in names}
        self._empty = {name: empty for names in same.values() for empty in [_empty(values[names[0]])] for name in names}
        for name, empty in self._empty.items():
            self._set(name, empty)
        # By module, "" for what models hold outside of all: its weights, their bytes, and the tensors of the files.
        self._weights: dict[str, list[str]] = {prefix: [] for prefix in ("", *self.modules)}
        for name in self._empty:
            self._weights[self._owner(name)].append(name)
        self._tensors: dict[str, list[str]] = {prefix: [] for prefix in self._weights}
        extra = dict.fromkeys(self._weights, 0)
        targets = files.targets(model)
        counts = Counter(targets.values())
        for name, target in targets.items():
            for prefix in {self._owner(tied) for tied in self._tied[target]}:
                self._tensors[prefix].append(name)
                extra[prefix] += files.n_bytes(name)
                if counts[target] > 1:  # experts: each, those of one projection together, and all of them
                    extra[prefix] += 2 * _FLOAT32_BYTES * self._empty[target].numel() // counts[target]
        self._bytes = {
            prefix: _FLOAT32_BYTES * sum(self._empty[name].numel() for name in names if self._tensors[prefix])
            for prefix, names in self._weights.items()
        }
        self.peak_bytes = max(n + extra[prefix] for prefix, n in self._bytes.items())
        self.total_bytes = sum(self._bytes.values())

    def estimate_s(self, n_tokens: int) -> float:
        """About how long a run over `n_tokens` takes, in seconds, from the time of reading one module and of multiplying."""
        import torch

        largest = max(self._bytes, key=self._bytes.__getitem__)
        start = time.perf_counter()
        self._fill(largest)
        self._clear(largest)
        reading = (time.perf_counter() - start) / self._bytes[largest] * self.total_bytes
        a, b = torch.ones(n_tokens, _MATMUL_SIZE), torch.ones(_MATMUL_SIZE, _MATMUL_SIZE)
        torch.mm(a, b)
        n_done, start = 0, time.perf_counter()
        while time.perf_counter() - start < _MATMUL_S:
            torch.mm(a, b)
            n_done += b.numel()
        per_weight = (time.perf_counter() - start) / n_done
        return float(reading + per_weight * self._multiplied())

    def _multiplied(self) -> float:
        """Weights that each token is multiplied with: of experts, those that it is sent to."""
        config = self.model.config.get_text_config()
        used = getattr(config, "num_experts_per_tok", None)
        total = 0.0
        for name, value in self._empty.items():
            if self._tensors[self._owner(name)] and value.dim() > 1:
                total += value.numel() * (min(used / value.shape[0], 1.0) if used and value.dim() == 3 else 1.0)
        return total

    def run(self, tokens: Any, advance: Advance) -> Any:
        """The model's logits of `tokens`, shape (batch, n_tokens, n_vocab). advance: told the bytes of each module that has run."""
        with self.filled(advance):
            return self.model(tokens, use_cache=False).logits

    @contextmanager
    def filled(self, advance: Advance = lambda _amount, _what="": None) -> Iterator[None]:
        """In the block, every module has its weights while it runs."""
        self._fill("")
        with ExitStack() as stack:
            for prefix, module in self.modules.items():
                if self._tensors[prefix]:
                    before = module.register_forward_pre_hook(self._before(prefix))
                    after = module.register_forward_hook(self._after(prefix, advance))
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    @contextmanager
    def weights_of(self, prefix: str) -> Iterator[None]:
        """In the block, a module has its weights."""
        self._fill(prefix)
        try:
            yield
        finally:
            self._clear(prefix)

    def _before(self, prefix: str) -> Callable[..., None]:
        return lambda _module, _arguments: self._fill(prefix)

    def _after(self, prefix: str, advance: Advance) -> Callable[..., None]:
        def free(_module: Any, _arguments: Any, _result: Any) -> None:
            self._clear(prefix)
            advance(self._bytes[prefix], prefix)

        return free

    def _fill(self, prefix: str) -> None:
        """Read the weights of a module, and give them to every name that is tied to one of them."""
        if not self._tensors[prefix]:
            return
        found = self._files.load(self.model, self._tensors[prefix])
        for name in self._weights[prefix]:
            loaded = [v for v in map(self._value, self._tied[name]) if v is not self._empty[name]]
            if not loaded:
                why = next(iter(found.conversion_errors.values()), "it is not in the files")
                raise YarnEdgeError(
                    f"{self._folder}: transformers cannot load {one_line(name, 100)}: {one_line(str(why), 300)}"
                )
            self._set(name, loaded[0].requires_grad_(False))

    def _clear(self, prefix: str) -> None:
        for name in {tied for weight in self._weights[prefix] for tied in self._tied[weight]}:
            self._set(name, self._empty[name])

    def _owner(self, name: str) -> str:
        """The module that has this weight, "" if none has."""
        return next((prefix for prefix in _parents(name) if prefix in self.modules), "")

    def _value(self, name: str) -> Any:
        path, _dot, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(path), attribute)

    def _set(self, name: str, value: Any) -> None:
        path, _dot, attribute = name.rpartition(".")
        setattr(self.model.get_submodule(path), attribute, value)


def _empty(weight: Any) -> Any:
    """In place of a weight on the meta device: its shape on the CPU in the memory of one number, so that what reads it gets NaN."""
    import torch

    if not weight.is_floating_point():
        return weight
    empty = torch.full((1,), torch.nan, dtype=weight.dtype).expand(weight.shape)
    return torch.nn.Parameter(empty, requires_grad=False) if isinstance(weight, torch.nn.Parameter) else empty


def _modules(model: Any, front: str = "") -> Iterator[tuple[str, Any]]:
    """(name, module) of what a model consists of: its layers, embeddings, last norm and head."""
    from torch.nn import ModuleList
    from transformers import PreTrainedModel

    for name, child in model.named_children():
        if isinstance(child, (ModuleList, PreTrainedModel)):
            yield from _modules(child, f"{front}{name}.")
        else:
            yield front + name, child


def _parents(name: str) -> Iterator[str]:
    """a.b, a of a.b.c."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def float32_bytes(model: Any) -> int:
    """The size of a model's weights in float32, in bytes, each of tied ones once."""
    tensors = (*model.parameters(), *model.buffers())
    return _FLOAT32_BYTES * sum(int(tensor.numel()) for tensor in tensors)


def open_layers(kind: Any, folder: Path, **arguments: Any) -> tuple[StreamedLayers, Mapping[str, Any]]:
    """(the model of transformers' class `kind`, without its weights; transformers' loading info).

    arguments: of from_pretrained. Raises YarnEdgeError for a model that computes with quantized values, and what transformers raises.
    """
    opened: list[LayerFiles] = []

    def declare(model: Any, _state: Any, files: Sequence[str], load_config: Any, *_others: Any) -> tuple[Any, None]:
        if not computes_in_floats(getattr(load_config.hf_quantizer, "quantization_config", None)):
            raise YarnEdgeError(f"{folder}: computes with quantized values, which cannot be run layer by layer")
        opened.append(LayerFiles(files, load_config))
        found = opened[0].declare(model)
        refuse_unloadable(folder, opened[0], model, found)
        return found, None

    def only_buffers(model: Any, _missing: Any, *others: Any) -> None:
        kind._move_missing_keys_from_meta_to_device(model, set(), *others)

    # The class's own name and module are how transformers finds the conversions of its weights.
    members = {
        "__module__": kind.__module__,
        "_load_pretrained_model": staticmethod(declare),
        "_move_missing_keys_from_meta_to_device": only_buffers,
    }
    without_weights: Any = type(kind.__name__, (kind,), members)
    model, found = without_weights.from_pretrained(folder, **arguments, output_loading_info=True)
    return StreamedLayers(folder, model.eval(), opened[0]), found
