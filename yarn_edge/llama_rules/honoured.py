"""Which of a file's rope keys the pinned llama.cpp honors, one row per architecture.

Source: src/models/*.cpp and src/llama-context.cpp of llama-cpp-python 0.3.36. tests/llama_rules/test_honoured.py compares the rows
with the running library, and so notices a version that honors more or less. docs/architectures.md is this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions.rope import Pairing


@dataclass(frozen=True)
class LogMultiplier:
    """How `rope.scaling.yarn_log_multiplier` is used, with m(x) = 0.1 x ln(factor) + 1 and 1 for factors up to 1.

    mscale_all_dim = key / unit. If neither it nor ext_factor is 0, the attention factor is m(mscale) / m(mscale_all_dim), with
    mscale = mscale_all_dim if `same_mscale`, else 1.
    """

    unit: float
    same_mscale: bool = False
    in_softmax: bool = False  # the softmax scale gets (attention factor * m(mscale_all_dim))^2


@dataclass(frozen=True)
class Sliding:
    """How layers with a sliding window are rotated, if the file has `attention.sliding_window`.

    Of every `period` layers, the last one has full attention, or the first one if `dense_first`. A list of booleans in
    `attention.sliding_window_pattern` overrides that; a number there is another period (0: every layer has a window).
    """

    period: int
    dense_first: bool = False
    # "model": as in full attention. "file": rope.freq_base_swa, else rope.freq_base. "10000": rope.freq_base_swa, else that.
    base: Literal["model", "file", "10000"] = "model"
    # "model": as in full attention. "file": 1 / rope.scaling.factor, whatever the type and the caller say. "one": unscaled.
    scale: Literal["model", "file", "one"] = "model"
    yarn: bool = True  # True: ext_factor and attention factor of full attention; False: 0 and 1
    # True: rope.dimension_count_swa is for these layers only. False: it is for all layers if layer 0 has a sliding window.
    own_dims: bool = False
    always: bool = False  # these layers are treated differently even if attention.sliding_window is 0 or absent


# Layers that are not rotated at all: none, every fourth, those with full attention if others have a sliding window, or those with
# linear attention.
Unrotated = Literal["", "every 4th", "full attention", "linear attention"]
LongFactors = Literal["", "longrope", "always"]
FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


@dataclass(frozen=True)
class Honoured:
    """What llama.cpp reads for an architecture in addition to type, factor, origin, attn_factor and freq_base.

    pairing: for text. by_axes: pairs follow the axes of `rope.dimension_sections` in turn (time, height, width: one position in text),
    and those beyond the sections a fourth axis, which is 0 in text.
    """

    pairing: Pairing
    frequency_factors: bool = False  # rope_freqs.weight divides the frequencies
    long_factors: LongFactors = ""  # rope_factors_long/short.weight: for type longrope only, or for every type
    whole_tables: bool = False  # these have half a head's length, however much of it is rotated
    betas: bool = False
    ext_factor: bool = False
    yarn_attn_factor: bool = False
    log_multiplier: LogMultiplier | None = None
    beta_fast: float = 32.0  # the default if neither the file nor the caller has a value
    # rope.dimension_count may be less than the head dimension. If False, llama.cpp refuses such a file or ends the process.
    partial_rotation: bool = False
    sliding: Sliding | None = None
    unrotated: Unrotated = ""
    ntk_alpha: bool = False  # rope.scaling.alpha: freq_base *= alpha^(d/(d-2)) with d = attention.key_length
    finetuned_switch: bool = False  # rope.scaling.finetuned = false turns off all rotation
    by_axes: bool = False

    def sections(self, dim: int) -> tuple[int, ...]:
        """rope.dimension_sections under which text turns all of `dim` / 2 pairs; () for an architecture without axes."""
        return (*((dim // 2 + 2 - axis) // 3 for axis in range(3)), 0) if self.by_axes else ()

    @property
    def table_names(self) -> tuple[str, ...]:
        """The tensors that carry one table of frequency factors for every context; () if llama.cpp loads none."""
        if self.frequency_factors:
            return (FREQUENCY_FACTORS,)
        return (LONG_FACTORS, SHORT_FACTORS) if self.long_factors == "always" and not self.whole_tables else ()


_PLAIN_NORM, _PLAIN_NEOX = Honoured("interleaved"), Honoured("half")
_PARTIAL_NORM = Honoured("interleaved", partial_rotation=True)
_PARTIAL_NEOX = Honoured("half", partial_rotation=True)
_LIKE_LLAMA = Honoured("interleaved", frequency_factors=True, long_factors="longrope")

# One row per GGUF architecture whose positions are known.
HONOURED: dict[str, Honoured] = {
    "llama": _LIKE_LLAMA,
    "mistral3": Honoured(
        "interleaved", frequency_factors=True, long_factors="longrope", betas=True, log_multiplier=LogMultiplier(1.0)
    ),
    "mistral4": Honoured("interleaved", partial_rotation=True, log_multiplier=LogMultiplier(0.1, in_softmax=True)),
    "qwen2": _PLAIN_NEOX,
    "qwen2moe": _PLAIN_NEOX,
    "qwen3": _PLAIN_NEOX,
    "qwen3moe": _PLAIN_NEOX,
    "qwen3vl": Honoured("half", by_axes=True),
    "qwen3vlmoe": Honoured("half", by_axes=True),
    "qwen3next": Honoured("half", partial_rotation=True, unrotated="linear attention"),
    "qwen35": Honoured("half", partial_rotation=True, unrotated="linear attention", by_axes=True),
    "qwen35moe": Honoured("half", partial_rotation=True, unrotated="linear attention", by_axes=True),
    "deepseek": _PLAIN_NORM,
    "deepseek2": Honoured(
        "interleaved", partial_rotation=True, log_multiplier=LogMultiplier(0.1, same_mscale=True, in_softmax=True)
    ),
    "gpt-oss": Honoured("half", sliding=Sliding(2, base="file", scale="file", always=True)),
    "olmo": _PLAIN_NORM,
    "olmo2": Honoured("half", sliding=Sliding(4, scale="one", yarn=False)),  # OLMo 3 too
    "olmoe": _PLAIN_NEOX,
    "phi3": Honoured("half", long_factors="always", partial_rotation=True),
    "phimoe": Honoured("half", long_factors="always", partial_rotation=True, whole_tables=True),
    "gemma2": Honoured("half", partial_rotation=True, sliding=Sliding(2, base="file", scale="file", always=True)),
    "gemma3": Honoured("half", partial_rotation=True, sliding=Sliding(6, base="10000", scale="one")),
    "granite": Honoured("interleaved", frequency_factors=True, long_factors="longrope", finetuned_switch=True),
    "granitemoe": _LIKE_LLAMA,
    "minicpm": _LIKE_LLAMA,
    "exaone": Honoured("half", frequency_factors=True),
    "exaone-moe": Honoured("half", frequency_factors=True, sliding=Sliding(4, always=True), unrotated="full attention"),
    "deci": _LIKE_LLAMA,
    "arcee": Honoured("interleaved", frequency_factors=True),
    "smollm3": Honoured("interleaved", unrotated="every 4th"),
    "seed_oss": _PLAIN_NEOX,
    "grok": Honoured("half", betas=True, ext_factor=True, yarn_attn_factor=True, beta_fast=8.0),
    "laguna": Honoured(
        "half",
        partial_rotation=True,
        sliding=Sliding(4, dense_first=True, base="file", scale="one", yarn=False, own_dims=True),
    ),
    "mellum": Honoured("half", sliding=Sliding(4, scale="one", yarn=False)),
    "glm4": _PARTIAL_NORM,
    "glm4moe": _PARTIAL_NEOX,
    "chatglm": _PARTIAL_NORM,
    "command-r": _PARTIAL_NORM,
    "cohere2": Honoured(
        "interleaved", partial_rotation=True, sliding=Sliding(4, always=True), unrotated="full attention"
    ),
    "internlm2": _PLAIN_NORM,
    "ernie4_5": _PLAIN_NORM,
    "ernie4_5-moe": _PLAIN_NORM,
    "hunyuan-dense": Honoured("half", ntk_alpha=True),
    "hunyuan-moe": _PLAIN_NEOX,
    "starcoder2": _PLAIN_NEOX,
    "stablelm": _PARTIAL_NEOX,
    "bailingmoe": _PLAIN_NORM,
    "bailingmoe2": _PARTIAL_NEOX,
    "apertus": Honoured("half", frequency_factors=True, long_factors="longrope"),
    "dots1": _PLAIN_NEOX,
    "afmoe": Honoured(
        "half", partial_rotation=True, sliding=Sliding(4, base="file", scale="file"), unrotated="every 4th"
    ),
    "minimax-m2": _PARTIAL_NEOX,
    "bitnet": _PARTIAL_NEOX,
    "falcon": _PLAIN_NEOX,
    "gptneox": _PARTIAL_NEOX,
    "nemotron": _PARTIAL_NEOX,
    "orion": _PLAIN_NEOX,
    "xverse": _PLAIN_NORM,
    "nanbeige": Honoured("interleaved", frequency_factors=True, partial_rotation=True),
    "jais2": _PLAIN_NEOX,
    "pangu-embedded": _PLAIN_NEOX,  # loads tables of factors but does not use them
}


# A checkpoint's model_type, and the GGUF architecture that convert makes of it.
GGUF_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "mixtral": "llama",
    "ministral3": "mistral3",
    "mistral3": "mistral3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_vl": "qwen3vl",
    "qwen3_vl_text": "qwen3vl",
    "qwen3_vl_moe": "qwen3vlmoe",
    "qwen3_vl_moe_text": "qwen3vlmoe",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_5_moe_text": "qwen35moe",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "phi3": "phi3",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "arcee": "arcee",
    "smollm3": "smollm3",
    "mellum": "mellum",
    "glm4": "glm4",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gpt_oss": "gpt-oss",
    "mistral4": "mistral4",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "kimi_k2": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "youtu": "deepseek2",
    "laguna": "laguna",
    "glm4_moe": "glm4moe",
    "solar_open": "glm4moe",
    "bailing_moe_v2": "bailingmoe2",
}

# The same with checkpoints that only llama.cpp's own converter reads (conversion/*.py).
CHECKPOINT_ARCHITECTURES = {
    **GGUF_ARCHITECTURES,
    "internlm3": "llama",
    "deepseek": "deepseek",
    "olmo": "olmo",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "granitemoeshared": "granitemoe",
    "minicpm": "minicpm",
    "exaone": "exaone",
    "exaone_moe": "exaone-moe",
    "nemotron-nas": "deci",
    "seed_oss": "seed_oss",
    "glm": "chatglm",
    "chatglm": "chatglm",
    "internlm2": "internlm2",
    "ernie4_5": "ernie4_5",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "apertus": "apertus",
    "dots1": "dots1",
    "afmoe": "afmoe",
    "minimax_m2": "minimax-m2",
    "bitnet": "bitnet",
    "falcon": "falcon",
    "gpt_neox": "gptneox",
    "nemotron": "nemotron",
    "orion": "orion",
    "jais2": "jais2",
}


# Classes of whose model_type there are others, and the name under which the tables have them.
_BY_CLASS = {"BailingMoeV2ForCausalLM": "bailing_moe_v2"}


def table_name(config: Mapping[str, object]) -> str:
    """The model_type under which the tables above have a checkpoint with these values of config.json."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return _BY_CLASS[name] if isinstance(name, str) and name in _BY_CLASS else str(config.get("model_type"))


def honoured(architecture: str) -> Honoured:
    """The row of an architecture. Raises YarnEdgeError with the known names for an unknown one."""
    if architecture not in HONOURED:
        raise YarnEdgeError(
            f"what llama.cpp applies for architecture {architecture!r} is not known yet; known: {_shortened(HONOURED)}"
        )
    return HONOURED[architecture]


def _shortened(names: dict[str, Honoured], most: int = 12) -> str:
    first, rest = list(names)[:most], len(names) - most
    return ", ".join(first) + (f" and {rest} more (docs/architectures.md)" if rest > 0 else "")
