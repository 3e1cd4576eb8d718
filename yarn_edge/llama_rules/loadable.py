"""Refuses a GGUF for which llama.cpp would call abort(), before llama.cpp sees the file.

A failed assertion in llama.cpp ends the whole Python process. These checks cover the values that llama.cpp asserts instead of
reporting (llama-model.cpp, llama-vocab.cpp, the graphs of the families we convert), as of llama-cpp-python 0.3.36. A hostile
file can still trigger others; then `verify` and `chat` end with a signal, not with a wrong result.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import has_sliding
from yarn_edge.llama_rules.honoured import HONOURED

ROPE_TYPES = ("none", "linear", "yarn", "longrope")
MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama-hparams.h
MAX_CONTEXT = 2**31 - 1
NO_WEIGHTS = frozenset({"F64", "I8", "I16", "I32", "I64"})
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def check_loadable(file: GGUFFile) -> None:
    """Raise YarnEdgeError, with the file and the key, for values that would end the process."""
    _check_scaling_type(file)
    _check_vocabulary(file)
    if file.tensors:
        _check_tensor_types(file)
        _check_numbers(file)
        _check_heads(file)


def _bad(file: GGUFFile, key: str, value: Any, expected: str) -> YarnEdgeError:
    return YarnEdgeError(f"{file.path}: {key} is {one_line(repr(value), 60)}; {expected}")


def has_known_type(file: GGUFFile) -> bool:
    """Whether llama.cpp knows the file's `rope.scaling.type`, or takes its default."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    return isinstance(kind, str) and kind in ROPE_TYPES


def _check_scaling_type(file: GGUFFile) -> None:
    key = f"{file.architecture}.rope.scaling.type"
    if not has_known_type(file):
        known = f"llama.cpp knows {', '.join(ROPE_TYPES)}: yarn-edge patch with --yarn-factor or --from CHECKPOINT replaces it"
        raise _bad(file, key, file.metadata[key], known)


def _check_vocabulary(file: GGUFFile) -> None:
    model = file.metadata.get("tokenizer.ggml.model")
    if model in ("none", "no_vocab"):
        raise _bad(file, "tokenizer.ggml.model", model, "the file has no vocabulary to tokenize with")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        return
    # llama.cpp reads them up to a NUL and renames empty ones, so several may be empty.
    named = {t.split("\0", 1)[0] or f"[EMPTY_{i}]" for i, t in enumerate(tokens)}
    if len(named) != len(tokens):
        raise YarnEdgeError(f"{file.path}: tokenizer.ggml.tokens has the same token twice")
    if model == "llama" and not named >= _BYTE_TOKENS:
        missing = min(_BYTE_TOKENS - named)
        raise YarnEdgeError(
            f"{file.path}: tokenizer.ggml.tokens has no {missing}, which a SentencePiece vocabulary needs"
        )


def _check_tensor_types(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        if tensor.type_name in NO_WEIGHTS or (len(tensor.shape) == 1 and tensor.type_name != "F32"):
            raise YarnEdgeError(
                f"{file.path}: tensor {one_line(tensor.name, 100)} of shape {list(tensor.shape)} is {tensor.type_name}, "
                "which llama.cpp does not compute with"
            )


def _check_numbers(file: GGUFFile) -> None:
    arch = file.architecture
    for name, limit in (
        ("block_count", MAX_LAYERS),
        ("embedding_length", MAX_CONTEXT),
        ("context_length", MAX_CONTEXT),
    ):
        value = file.required_int(name)
        if value > limit:
            raise _bad(file, f"{arch}.{name}", value, f"llama.cpp takes at most {limit}")
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        eps = file.number(name)
        if eps is not None and not 0 < eps < 1:
            raise _bad(file, f"{arch}.{name}", eps, "expected a number between 0 and 1")
    extra = file.number("nextn_predict_layers", 0) or 0
    if not 0 <= extra <= file.required_int("block_count"):
        raise _bad(file, f"{arch}.nextn_predict_layers", extra, "more than block_count")
    if isinstance(file.metadata.get(f"{arch}.expert_used_count"), np.ndarray):  # one number per layer
        return
    experts, used = (file.number(f"{name}", 0) or 0 for name in ("expert_count", "expert_used_count"))
    if not 0 <= used <= experts <= MAX_EXPERTS or (experts > 0) != (used > 0):
        raise _bad(file, f"{arch}.expert_used_count", used, f"the model has {experts:g} experts")


def _check_heads(file: GGUFFile) -> None:
    arch = file.architecture
    if any(isinstance(file.metadata.get(f"{arch}.attention.{n}"), np.ndarray) for n in ("head_count", "head_count_kv")):
        return  # some architectures have one number per layer
    heads = file.required_int("attention.head_count")
    kv_heads = file.number("attention.head_count_kv", heads) or 0
    if kv_heads <= 0 or heads % kv_heads:
        raise YarnEdgeError(f"{file.path}: {heads} attention heads cannot share {kv_heads} key-value heads")
    default = file.required_int("embedding_length") // heads
    key_width, value_width = (file.number(f"attention.{n}_length", default) or 0 for n in ("key", "value"))
    rotated = file.number("rope.dimension_count", key_width) or 0
    if not 0 < rotated <= key_width or rotated % 2:
        raise _bad(file, f"{arch}.rope.dimension_count", rotated, f"heads have {key_width:g} dimensions")
    row = HONOURED.get(arch)
    if row is None:
        return
    if not row.partial_rotation and not rotated == key_width == value_width:
        raise _bad(
            file,
            f"{arch}.rope.dimension_count",
            rotated,
            f"llama.cpp runs {arch} only if it equals the key and the value length, which are {key_width:g} and {value_width:g}",
        )
    latent = file.number("attention.key_length_mla")
    if latent is not None and rotated >= latent:
        raise _bad(file, f"{arch}.rope.dimension_count", rotated, f"attention.key_length_mla is {latent:g}")
    sliding = file.number("rope.dimension_count_swa", rotated)
    if row.sliding is not None and not row.partial_rotation and sliding != rotated:
        raise _bad(
            file, f"{arch}.rope.dimension_count_swa", sliding, f"llama.cpp runs {arch} only if it is {rotated:g}"
        )
    _check_windows(file)


def _check_windows(file: GGUFFile) -> None:
    """llama.cpp makes a second cache for layers with a sliding window, and asserts that there is such a layer."""
    pattern = file.metadata.get(f"{file.architecture}.attention.sliding_window_pattern")
    if not has_sliding(file):
        return
    if isinstance(pattern, np.ndarray) and not pattern[: file.required_int("block_count")].any():
        raise _bad(
            file, f"{file.architecture}.attention.sliding_window_pattern", "all false", "no layer has a sliding window"
        )
