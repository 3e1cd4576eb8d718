"""The reference for logits: the checkpoint itself, run by transformers in float32."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.checkpoint.adapter import refuse_unmerged
from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.quantized import refuse_quantized
from yarn_edge.checkpoint.tensor_names import KEY_MAPPING
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.likelihood import Rows
from yarn_edge.memory.choice import gib
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import bar, note
from yarn_edge.regular_file import refuse_special_files
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.machine import spare_bytes
from yarn_edge.verify.dequantized import computes_in_floats
from yarn_edge.verify.reference_config import transformers_config
from yarn_edge.verify.second_run import run_layers_again
from yarn_edge.verify.streamed_layers import StreamedLayers, float32_bytes, open_layers
from yarn_edge.verify.unloadable import first_of, refuse_quantized_weights


@dataclass(frozen=True)
class Divergence:
    """How far logits are from the reference over `n_tokens` predictions. KL is KL(reference || other) in nats."""

    n_tokens: int
    kl_mean: float
    kl_max: float
    top1: float


def reference_logits(
    folder: Path, tokens: Sequence[int], replaced: RopeScaling | None = None, *, streamed: bool | None = None
) -> npt.NDArray[np.float32]:
    """The logits of every position by transformers, float32, shape (n_tokens, n_vocab).

    replaced: a static scaling whose frequencies and A replace those that transformers reads from config.json (only for flags,
    and for dialects that transformers reads differently). streamed: run it layer by layer, with the weights of one in memory;
    by default if all of them do not fit into the free memory. Raises YarnEdgeError without transformers, and if it cannot load
    the checkpoint.
    """
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        raise YarnEdgeError("comparing with a checkpoint needs transformers: pip install 'yarn-edge[hf]'") from error
    refuse_special_files(folder)
    model, layers, needed = _open(folder, replaced, streamed)
    if replaced is not None:
        _replace_rotary(model, replaced)
    batch = torch.tensor([list(tokens)])
    with torch.inference_mode():
        if layers is None:
            with bar("Running the checkpoint in transformers", 1):
                logits = model(batch, use_cache=False).logits[0]
        else:
            _tell(folder, layers, needed, len(tokens))
            with bar("Running the checkpoint in transformers", layers.total_bytes, "bytes") as advance:
                logits = layers.run(batch, advance)[0]
    return np.asarray(logits.numpy(), dtype=np.float32)


@contextmanager
def open_differentiable(folder: Path) -> Iterator[Any]:
    """transformers' model of a checkpoint in float32, streamed: its layers have weights only while they run, and run again in a backward
    pass. Nothing but results has gradients, and nothing is dropped. Raises YarnEdgeError as `reference_logits` does.
    """
    import torch

    refuse_special_files(folder)
    model, layers, _needed = _open(folder, None, True)
    assert layers is not None
    run_layers_again(layers)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with _errors_naming(folder), layers.filled():
        yield model


def check_reference(folder: Path, replaced: RopeScaling | None = None) -> None:
    """Raise YarnEdgeError if transformers, where it is installed, cannot load a checkpoint with these headers. See `reference_logits`."""
    if importlib.util.find_spec("transformers") is None:
        return
    refuse_special_files(folder)
    with _errors_naming(folder):
        empty, _wrapped, arguments = _prepare(folder, replaced)
        if computes_in_floats(getattr(empty.config, "quantization_config", None)):
            _layers, found = open_layers(type(empty), folder, config=empty.config, **arguments)
            _check_found(folder, found)


@contextmanager
def _errors_naming(folder: Path) -> Iterator[None]:
    """Turn what transformers raises into a YarnEdgeError."""
    try:
        yield
    except YarnEdgeError:
        raise
    except Exception as error:  # many libraries raise many kinds
        raise YarnEdgeError(f"{folder}: transformers cannot load it: {one_line(str(error), 300)}") from error


def _prepare(folder: Path, replaced: RopeScaling | None) -> tuple[Any, Any, dict[str, Any]]:
    """(the model without weights, its class if it stands inside a wrapper, the arguments of from_pretrained)."""
    import torch
    import transformers

    refuse_quantized_weights(folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers_config(folder, replaced)
    wrapped = _inside_wrapper(config)
    with torch.device("meta"):
        if wrapped is None:
            empty = transformers.AutoModelForCausalLM.from_config(deepcopy(config), trust_remote_code=False)
        else:
            empty = wrapped._from_config(deepcopy(config))
    arguments = {
        "dtype": torch.float32,
        "local_files_only": True,
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "key_mapping": KEY_MAPPING,
    }
    return empty, wrapped, arguments


def _open(folder: Path, replaced: RopeScaling | None, streamed: bool | None) -> tuple[Any, StreamedLayers | None, int]:
    """(the model, how its layers are streamed if they are, the size of its weights in bytes)."""
    import transformers

    layers = None
    with _errors_naming(folder):
        empty, wrapped, arguments = _prepare(folder, replaced)
        needed = float32_bytes(empty)
        if needed > spare_bytes() if streamed is None else streamed:
            layers, found = open_layers(type(empty), folder, config=empty.config, **arguments)
            model = layers.model
        else:
            kind = wrapped or transformers.AutoModelForCausalLM
            arguments |= {"config": transformers_config(folder, replaced), "output_loading_info": True}
            try:
                model, found = kind.from_pretrained(folder, **arguments)
            except RuntimeError:  # it names tensors in a log alone
                check_reference(folder, replaced)
                raise
    _check_found(folder, found)
    return model.eval(), layers, needed


def _inside_wrapper(config: Any) -> Any:
    """transformers' class for a config that it knows only as a multimodal model, made with the language model alone; else None.

    It is the same class, under its name, by which transformers finds the spellings of its tensors. The encoders and projectors beside
    the language model are taken away when an instance is made, so that their tensors are neither read nor missed.
    """
    import transformers

    kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if kind is None or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return None

    def with_text_alone(model: Any, *arguments: Any, **others: Any) -> None:
        kind.__init__(model, *arguments, **others)
        for name, child in list(model.base_model.named_children()):
            if child is not model.get_decoder():
                setattr(model.base_model, name, None)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__init__": with_text_alone})


def _tell(folder: Path, layers: StreamedLayers, needed: int, n_tokens: int) -> None:
    """What a streamed run will take."""
    seconds = layers.estimate_s(n_tokens)
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    note(
        f"{folder}: its weights take {gib(needed)} in float32, {gib(spare_bytes())} may be used: transformers runs one layer after "
        f"the other, with about {gib(layers.peak_bytes)} at a time, in about {time}"
    )


def _check_found(folder: Path, found: Mapping[str, Any]) -> None:
    """Raise YarnEdgeError if tensors are missing: transformers would start them at random. found: its loading info."""
    missing, others = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if not missing:
        return
    refuse_unmerged(str(folder), others)
    refuse_quantized(read_config(folder), str(folder), dict.fromkeys(others, ""), {""})
    there = f" (it has {one_line(others[0], 100)})" if others else ""
    raise YarnEdgeError(f"{folder}: transformers does not find {first_of(missing, there)}: no reference")


def _replace_rotary(model: Any, scaling: RopeScaling) -> None:
    """Set the reference's frequencies and A in every rotary embedding of a transformers model."""
    import torch

    rotary = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")]
    if not rotary or any(m.inv_freq.shape != (scaling.dim // 2,) for m in rotary):
        raise YarnEdgeError("transformers keeps this model's positions elsewhere: they cannot be replaced")
    for module in rotary:
        module.inv_freq = torch.from_numpy(rope.inv_freq(scaling).astype(np.float32))
        module.attention_scaling = scaling.attention_factor


def rope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """A RopeScaling as transformers v5's rope_parameters."""
    if scaling.method == "none":
        return {"rope_type": "default", "rope_theta": scaling.rope_theta}
    parameters = {"rope_type": scaling.method, "rope_theta": scaling.rope_theta, "factor": scaling.factor}
    if scaling.method == "yarn":
        parameters |= {
            "original_max_position_embeddings": scaling.original_context,
            "attention_factor": scaling.attention_factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
    return parameters


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The log-softmax of each row in float64, shape (n, n_vocab)."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=1, keepdims=True)))


def divergence(truth: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> Divergence:
    """KL divergence and top-1 agreement of two sets of logits, each (n_tokens, n_vocab)."""
    if truth.shape != other.shape:
        raise YarnEdgeError(f"logits of shape {truth.shape} and {other.shape} cannot be compared")
    with Rows(physical_threads()) as rows:
        log_z, top = rows.log_normalizers(truth), truth.argmax(axis=1)
        found = rows.divergences(truth, log_z, top, other, np.zeros(len(truth), np.int64))
    return Divergence(len(truth), float(found.kl.mean()), float(found.kl.max()), float(found.same_top.mean()))


def merge(parts: Sequence[Divergence]) -> Divergence:
    """The divergence over all tokens of `parts`."""
    n = sum(p.n_tokens for p in parts)
    mean, top1 = (sum(getattr(p, name) * p.n_tokens for p in parts) / n for name in ("kl_mean", "top1"))
    return Divergence(n, mean, max(p.kl_max for p in parts), top1)
