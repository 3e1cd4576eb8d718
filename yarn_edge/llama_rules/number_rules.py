"""The numbers of a GGUF that llama.cpp asserts, divides by or allocates by, as rows: ranges of keys, then what keys say together.

Sources: llama-hparams.h, llama-model.cpp (load_hparams, create_memory), llama-graph.cpp, llama-kv-cache.cpp, ggml-cpu/ops.cpp and
models/*.cpp of llama-cpp-python 0.3.36. A key of another GGUF type is refused by llama.cpp itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import has_sliding, recurs, slides
from yarn_edge.llama_rules.honoured import HONOURED

MAX_LAYERS, MAX_EXPERTS = 512, 1024  # llama-hparams.h
MAX_CONTEXT = 2**31 - 1
MAX_WINDOW = 2**24  # llama.cpp reserves 4 bytes for each token of a window in every graph


@dataclass(frozen=True)
class Range:
    """Whole numbers of a key that llama.cpp takes. architectures: for which it needs one, and not 0; empty for none."""

    low: int
    high: int
    why: str
    architectures: frozenset[str] = frozenset()


def _of(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Keys that every model has.
REQUIRED = {"block_count": MAX_LAYERS, "embedding_length": MAX_CONTEXT, "context_length": MAX_CONTEXT}
RANGES: dict[str, tuple[Range, ...]] = {
    "attention.sliding_window": (
        Range(0, MAX_WINDOW, f"llama.cpp reserves memory for each token, so at most {MAX_WINDOW} are taken"),
        Range(1, MAX_WINDOW, "llama.cpp runs {arch} only with a window", _of("afmoe")),
    ),
    "expert_count": (
        Range(0, MAX_EXPERTS, f"llama.cpp takes at most {MAX_EXPERTS}"),
        Range(
            1, MAX_EXPERTS, "llama.cpp runs {arch} only with experts", _of("bailingmoe2 glm4moe grovemoe smallthinker")
        ),
    ),
    "experts_per_group": (Range(1, MAX_EXPERTS, "llama.cpp needs a number above 0", _of("grovemoe")),),
    "expert_gating_func": (Range(0, 4, "llama.cpp knows 1 (softmax), 2 (sigmoid), 3 and 4"),),
    "full_attention_interval": (Range(1, MAX_LAYERS, "llama.cpp divides by it"),),
    "interleave_moe_layer_step": (Range(1, MAX_LAYERS, "llama.cpp divides by it", _of("ernie4_5-moe")),),
}
LINEAR = _of("qwen3next qwen35 qwen35moe")
EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Their graphs take the gating function from the file, and have none for an absent one.
NO_DEFAULT_GATING = _of(
    "bailingmoe2 bailingmoe3 deepseek32 dots1 dots3note exaone-moe hy_v4 kimi-k3 kimi-linear minimax-m2 minimax-m3 smallthinker"
)
EXPERTS_BY_LAYER = _of("nemotron_h nemotron_h_moe")  # other graphs take the number that the first layer uses
SCALES_BY_POSITION = _of("deepseek2 mistral4")  # attention.temperature_scale, in steps of attention.temperature_length
NO_SHARED_HEADS = _of("dots1")  # its keys and values have as many heads as its queries
UNEQUAL_HEADS = _of("deepseek2 gemma2 gemma3 mistral4")  # their graphs take key and value heads of different widths
ROTATES_BY_SECTIONS = _of("hunyuan_vl paddleocr qwen2vl qwen3vl qwen3vlmoe qwen35 qwen35moe qwen4exp")


def check_numbers(file: GGUFFile) -> None:
    """Raise YarnEdgeError, with the key, for a number that would end the process. The file must have tensors."""
    for name, limit in REQUIRED.items():
        if file.required_int(name) > limit:
            raise file.wrong(f"{file.architecture}.{name}", f"llama.cpp takes at most {limit}")
    for name, ranges in RANGES.items():
        _check_range(file, name, ranges)
    for name in EPSILONS:
        eps = file.number(name)
        if eps is not None and not 0 < eps < 1:
            raise file.wrong(f"{file.architecture}.{name}", "expected a number between 0 and 1")
    if not 0 <= (file.number("nextn_predict_layers", 0) or 0) < file.required_int("block_count"):
        key = f"{file.architecture}.nextn_predict_layers"
        raise file.wrong(key, f"not more than block_count ({file.required_int('block_count')}) less one are possible")
    _check_experts(file)
    _check_heads(file)
    if file.architecture in LINEAR:
        _check_linear(file)


def _check_range(file: GGUFFile, name: str, ranges: tuple[Range, ...]) -> None:
    arch, value = file.architecture, file.number(name)
    for row in ranges:
        needed = arch in row.architectures
        if (needed or (value is not None and not row.architectures)) and not row.low <= (value or 0) <= row.high:
            raise file.wrong(f"{arch}.{name}", row.why.format(arch=arch))


def _check_experts(file: GGUFFile) -> None:
    arch, total = file.architecture, file.number("expert_count", 0) or 0
    used = file.numbers("expert_used_count", file.required_int("block_count"))
    most = max(used, default=0)
    if not 0 <= min(used, default=0) <= most <= total or (total > 0) != (most > 0):
        raise file.wrong(f"{arch}.expert_used_count", f"the model has {total:g} experts")
    if len(set(used)) > 1 and arch not in EXPERTS_BY_LAYER:
        raise file.wrong(f"{arch}.expert_used_count", f"llama.cpp runs {arch} only with one number for all layers")
    if total and arch in NO_DEFAULT_GATING and not file.number("expert_gating_func"):
        raise file.wrong(f"{arch}.expert_gating_func", f"llama.cpp has no default for {arch}: 1 is softmax, 2 sigmoid")
    groups, chosen = (file.number(f"expert_group_{n}", 0) or 0 for n in ("count", "used_count"))
    if not 0 <= groups < max(total, 1) or (groups > 1 and total % groups):
        raise file.wrong(f"{arch}.expert_group_count", f"{total:g} experts cannot be in so many groups")
    if groups > 1 and not 0 < chosen < groups:
        raise file.wrong(f"{arch}.expert_group_used_count", f"the experts are in {groups:g} groups")


def _check_heads(file: GGUFFile) -> None:
    arch, n_layers = file.architecture, file.required_int("block_count")
    latent = file.number("attention.key_length_mla")
    per_layer = [
        n for n in ("head_count", "head_count_kv") if isinstance(file.metadata.get(f"{arch}.attention.{n}"), np.ndarray)
    ]
    if not per_layer:
        heads = file.required_int("attention.head_count")
        kv_heads = file.number("attention.head_count_kv", heads) or 0
        if kv_heads <= 0 or heads % kv_heads:
            raise YarnEdgeError(f"{file.path}: {heads} attention heads cannot share {kv_heads} key-value heads")
    key = f"{arch}.attention.head_count_kv"
    shared = file.numbers("attention.head_count_kv", n_layers)
    if latent is not None and set(shared) - {1}:
        raise file.wrong(key, "with attention.key_length_mla llama.cpp runs one key-value head only")
    if arch in NO_SHARED_HEADS and shared and shared != file.numbers("attention.head_count", n_layers):
        raise file.wrong(key, f"llama.cpp runs {arch} only with as many as attention.head_count")
    if not per_layer:
        _check_widths(file, heads, latent)


def _check_widths(file: GGUFFile, heads: int, latent: float | None) -> None:
    """The dimensions of a head and how many of them are rotated."""
    arch = file.architecture
    default = file.required_int("embedding_length") // heads
    key_width, value_width = (file.number(f"attention.{n}_length", default) or 0 for n in ("key", "value"))
    rotated = file.number("rope.dimension_count", key_width) or 0
    if not 0 < rotated <= key_width or rotated % 2:
        raise file.wrong(f"{arch}.rope.dimension_count", f"heads have {key_width:g} dimensions", rotated)
    _check_sections(file, key_width)
    row = HONOURED.get(arch)
    if row is None:
        return
    if not row.partial_rotation and not rotated == key_width == value_width:
        raise file.wrong(
            f"{arch}.rope.dimension_count",
            f"llama.cpp runs {arch} only if it equals the key and the value length, which are {key_width:g} and {value_width:g}",
            rotated,
        )
    if arch not in UNEQUAL_HEADS and key_width != value_width:
        raise file.wrong(
            f"{arch}.attention.key_length", f"llama.cpp needs the value length, {value_width:g}", key_width
        )
    if latent is not None:
        _check_latent(file, rotated, latent, key_width)
    _check_windows(file, rotated, key_width, value_width)


def _check_latent(file: GGUFFile, rotated: float, latent: float, key_width: float) -> None:
    """Multi-head latent attention: the cache has compressed keys, and their rotated part (deepseek2.cpp)."""
    arch = file.architecture
    if rotated >= latent:
        raise file.wrong(f"{arch}.rope.dimension_count", f"attention.key_length_mla is {latent:g}")
    rank = file.number("attention.kv_lora_rank", 0) or 0
    if key_width != rank + rotated:
        raise file.wrong(
            f"{arch}.attention.key_length", f"kv_lora_rank and rope.dimension_count are {rank + rotated:g}", key_width
        )
    scale, step = (file.number(f"attention.temperature_{n}", 0) or 0 for n in ("scale", "length"))
    if arch in SCALES_BY_POSITION and scale and step <= 0:
        raise file.wrong(f"{arch}.attention.temperature_length", "attention.temperature_scale needs one above 0")


def _check_sections(file: GGUFFile, key_width: float) -> None:
    """Rotation in three axes: how many pairs each axis has."""
    arch = file.architecture
    key = f"{arch}.rope.dimension_sections"
    sections = file.numbers("rope.dimension_sections", 4)
    if sections and (min(sections) < 0 or sum(sections) > key_width):
        raise file.wrong(key, f"heads have {key_width:g} dimensions")
    if arch in ROTATES_BY_SECTIONS and key in file.metadata and not any(sections[:3]):
        raise file.wrong(key, f"llama.cpp runs {arch} only with a section above 0")


def _check_linear(file: GGUFFile) -> None:
    """Layers with linear attention: llama.cpp asserts that there are such layers and others, and that their heads fit together."""
    arch = file.architecture
    size, heads, groups = (file.required_int(f"ssm.{n}") for n in ("state_size", "time_step_rank", "group_count"))
    if heads % groups:
        raise file.wrong(f"{arch}.ssm.time_step_rank", f"ssm.group_count is {groups}, which does not divide it")
    if file.required_int("ssm.inner_size") != size * heads:
        raise file.wrong(f"{arch}.ssm.inner_size", f"ssm.state_size * ssm.time_step_rank is {size * heads}")
    n_layers = file.required_int("block_count") - int(file.number("nextn_predict_layers", 0) or 0)
    found = {recurs(file, layer) for layer in range(n_layers)}
    if len(found) < 2:
        kind = "linear" if True in found else "full"
        raise file.wrong(
            f"{arch}.attention.recurrent_layers",
            f"every layer has {kind} attention: llama.cpp runs {arch} only with both",
        )


def _check_windows(file: GGUFFile, rotated: float, key_width: float, value_width: float) -> None:
    """llama.cpp makes a second cache for layers with a sliding window, and asserts that there is such a layer."""
    arch, row = file.architecture, HONOURED[file.architecture]
    sliding = file.number("rope.dimension_count_swa", rotated) or 0
    if row.sliding is not None and not row.partial_rotation and sliding != rotated:
        raise file.wrong(
            f"{arch}.rope.dimension_count_swa", f"llama.cpp runs {arch} only if it is {rotated:g}", sliding
        )
    if not has_sliding(file):
        return
    if not 0 < sliding <= key_width or sliding % 2:
        raise file.wrong(f"{arch}.rope.dimension_count_swa", f"heads have {key_width:g} dimensions", sliding)
    for name, width in (("key", key_width), ("value", value_width)):
        if file.number(f"attention.{name}_length_swa", width) != width:
            expected = f"llama.cpp runs {arch} only if it equals attention.{name}_length, which is {width:g}"
            raise file.wrong(f"{arch}.attention.{name}_length_swa", expected)
    n_layers = file.required_int("block_count") - int(file.number("nextn_predict_layers", 0) or 0)
    if not any(slides(file, layer) for layer in range(n_layers)):
        raise file.wrong(f"{arch}.attention.sliding_window_pattern", "no layer has a sliding window")
