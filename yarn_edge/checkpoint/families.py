"""A model family's defaults for what its config does not say about positions, as rows of data by `model_type`.

Source: the configuration classes of transformers 5.23 (`default_theta`, `head_dim`, `partial_rotary_factor`,
`convert_rope_params_to_dict`, `yarn_apply_mscale`). The tests compare the tables with those classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.errors import YarnEdgeError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


@dataclass(frozen=True)
class Layers:
    """Positions by layer type.

    flat: a block without layer types is for the full-attention layers, and the sliding ones have plain RoPE with base
    `local_theta` (or the config's `local_theta_key`). Without `flat` the block must name the layer types. shared_theta: the
    config's rope_theta was once used for the sliding layers too (for OLMo 3, by transformers 4 but not by transformers 5).
    """

    flat: bool = False
    local_theta: float = 10000.0
    local_theta_key: str = ""
    shared_theta: bool = False


@dataclass(frozen=True)
class Windows:
    """Layers with a sliding window. Without layer_types in the config, every `period`-th layer has full attention (0: all have).

    period_keys: the config's keys for another period. default: of sliding_window.
    """

    period: int
    default: int
    period_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    partial: the share of a head's dimensions that is rotated. rotated_key: the config's key for the rotated dimensions, if those of
    `head_dim_key` are only the others. softmax: attention logits are multiplied by m(mscale_all_dim)
    squared (DeepSeek). original_context: the default if the top level of the config has no original_max_position_embeddings,
    whatever the block says. aliases: this family's names for rope types. theta_key: the config's key for the base outside a
    block. declares_context: a max_position_embeddings below original context times factor is the context that the makers state;
    in other families it is left from before the extension (Qwen3's is 40960). default_block: what transformers uses if the config
    has no block at all, None for plain RoPE.
    """

    model_type: str
    rope_theta: float = 10000.0
    head_dim: int | None = None
    head_dim_key: str = "head_dim"
    rotated_key: str = ""
    partial: float = 1.0
    softmax: bool = False
    layers: Layers | None = None
    original_context: int | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    extra_keys: frozenset[str] = frozenset()
    theta_key: str = "rope_theta"
    declares_context: bool = False
    default_block: str | None = None


ROPE_THETAS: dict[str, float] = {
    "apertus": 12e6, "bitnet": 5e5, "cohere": 5e5, "cwm": 1e6, "ernie4_5": 5e5, "ernie4_5_moe": 5e5, "flex_olmo": 5e5,
    "gemma3_text": 1e6, "gemma3n_text": 1e6, "gpt_oss": 150000.0, "helium": 1e5, "hy_v3": 11158840.0, "lfm2": 1e6,
    "lfm2_moe": 1e6, "lfm3": 1e6, "llama4_text": 5e5, "longcat_flash": 1e7, "minimax": 1e6, "minimax_m2": 5e6,
    "minimax_m3_vl_text": 5e6, "mixtral": 1e6, "mllama_text_model": 5e5, "olmo3": 5e5, "paddleocr_vl_text": 5e5,
    "phimoe": 1e6, "qwen2_5_omni_text": 1e6, "qwen2_5_vl_text": 1e6, "qwen2_vl_text": 1e6, "qwen3_omni_moe_text": 1e6,
    "qwen3_vl_moe_text": 5e5, "qwen3_vl_text": 5e5, "smollm3": 2e6, "solar_open": 1e6,
}  # fmt: skip
HEAD_DIMS: dict[str, int] = {
    "afmoe": 128, "cwm": 128, "ernie4_5": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256, "gemma3n_text": 256,
    "gemma4_text": 256, "glm": 128, "glm4": 128, "gpt_oss": 64, "helium": 128, "hy_v3": 128, "internlm3": 128,
    "laguna": 128, "lfm3": 128, "llama4_text": 128, "mellum": 128, "mimo_v2_flash": 192, "minimax_m2": 128,
    "minimax_m3_vl_text": 128, "ministral3": 128, "paddleocr_vl_text": 128, "qwen3": 128, "qwen3_5_moe_text": 256,
    "qwen3_5_text": 256, "qwen3_next": 256, "qwen3_vl_text": 128, "seed_oss": 128, "solar_open": 128, "step3p5": 128,
    "vaultgemma": 256, "zaya": 128,
}  # fmt: skip
PARTIAL: dict[str, float] = {
    "bamba": 0.5, "glm": 0.5, "glm4": 0.5, "glm4_moe": 0.5, "gpt_neox": 0.25, "nemotron": 0.5, "persimmon": 0.5,
    "phi": 0.5, "qwen3_5_moe_text": 0.25, "qwen3_5_text": 0.25, "qwen3_next": 0.25, "recurrent_gemma": 0.5,
    "stablelm": 0.25,
}  # fmt: skip
# Latent attention: only qk_rope_head_dim dimensions of a head are rotated.
LATENT: tuple[str, ...] = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2", "youtu")
LAYERS: dict[str, Layers] = {
    "gemma3_text": Layers(flat=True, local_theta_key="rope_local_base_freq"),
    "gemma3n_text": Layers(flat=True, local_theta_key="rope_local_base_freq"),
    "olmo3": Layers(flat=True, local_theta=5e5, shared_theta=True),
} | dict.fromkeys(
    (
        "deepseek_v4",
        "gemma4_text",
        "laguna",
        "lfm3",
        "mellum",
        "mimo_v2_flash",
        "modernbert",
        "modernbert-decoder",
        "step3p7_text",
        "t5gemma2_text",
        "zaya",
    ),
    Layers(),
)
WINDOWS: dict[str, Windows] = {
    "olmo3": Windows(period=4, default=4096),
    "mellum": Windows(period=0, default=1024),
    "cohere2": Windows(period=4, default=4096, period_keys=("sliding_window_pattern",)),
    "gpt_oss": Windows(period=2, default=128),
    "laguna": Windows(period=0, default=512),
    "gemma3_text": Windows(period=6, default=4096, period_keys=("sliding_window_pattern", "_sliding_window_pattern")),
}
# transformers' Phi3Config: `su` and `yarn` are old names for LongRoPE, and the original context is an attribute.
_PHI3: Mapping[str, object] = {"aliases": {"yarn": "longrope"}, "original_context": 4096}
# Queries are multiplied by 1 + beta ln(1 + floor(position / original context)). The block repeats max_position_embeddings.
_LLAMA4_SCALING: Mapping[str, object] = {"extra_keys": frozenset({"llama_4_scaling_beta", "max_position_embeddings"})}
_OTHERS: dict[str, Mapping[str, object]] = {"phi3": _PHI3, "phi4_multimodal": _PHI3, "ministral3": _LLAMA4_SCALING}
_OTHERS |= {name: {"head_dim_key": "qk_rope_head_dim", "softmax": True} for name in LATENT}
_OTHERS["mistral4"] = {
    **_LLAMA4_SCALING,
    "head_dim_key": "qk_nope_head_dim",
    "rotated_key": "qk_rope_head_dim",
    "softmax": True,
}
_OTHERS |= {name: {"theta_key": "rotary_emb_base"} for name in ("gpt_neox", "gpt_neox_japanese")}
# In text all three axes of M-RoPE have one position, so that the sections change nothing.
_AXES: Mapping[str, object] = {"extra_keys": frozenset({"mrope_section", "mrope_interleaved"})}
_OTHERS |= dict.fromkeys(("qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text"), _AXES)
_OTHERS["arcee"] = {"declares_context": True}  # AFM-4.5B: 65536, its factor 20 reaches 81920
# Families whose configuration class scales even without a block in the config: transformers' block, as JSON.
_OPENAI = (
    '{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false, '
    '"original_max_position_embeddings": 4096, "rope_theta": 150000.0}'
)
_GEMMA4 = (
    '{"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": '
    '{"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0}}'
)
DEFAULT_BLOCKS: dict[str, str] = {
    "apertus": '{"rope_type": "llama3", "rope_theta": 12000000.0, "factor": 8.0, "original_max_position_embeddings": 8192, '
    '"low_freq_factor": 1.0, "high_freq_factor": 4.0}',
    "cwm": '{"rope_type": "llama3", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 8192, '
    '"low_freq_factor": 1.0, "high_freq_factor": 4.0}',
    "diffusion_gemma_text": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_oss": _OPENAI,
    "higgs_audio_v2": '{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "original_max_position_embeddings": '
    '1024, "low_freq_factor": 0.125, "high_freq_factor": 0.5}',
    "lfm3": '{"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": '
    '{"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1000000.0}}',
    "ministral3": '{"rope_type": "yarn", "type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, '
    '"original_max_position_embeddings": 16384, "max_position_embeddings": 262144, "beta_fast": 32.0, "beta_slow": 1.0, '
    '"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}',
    "mistral4": '{"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0, "factor": 128.0, '
    '"original_max_position_embeddings": 8192, "max_position_embeddings": 1048576, "beta_fast": 32.0, "beta_slow": 1.0, '
    '"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "partial_rotary_factor": 0.5}',
    "mistral_large4_text": '{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2048.0, '
    '"original_max_position_embeddings": 512, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}',
    "openai_privacy_filter": _OPENAI,
}


def family_of(config: ConfigFile) -> Family:
    """The row of a config's model_type; a row of defaults for an unknown one."""
    model_type = config.values.get("model_type")
    name = model_type if isinstance(model_type, str) else ""
    others: dict[str, object] = {
        "rope_theta": ROPE_THETAS.get(name, 10000.0),
        "head_dim": HEAD_DIMS.get(name),
        "partial": PARTIAL.get(name, 1.0),
        "layers": LAYERS.get(name),
        "default_block": DEFAULT_BLOCKS.get(name),
        **_OTHERS.get(name, {}),
    }
    return Family(name, **others)  # type: ignore[arg-type]


def head_dim(config: ConfigFile) -> int:
    """The dimensions of one attention head that positions may use, see `head_dim_and_source`."""
    return head_dim_and_source(config)[0]


def head_dim_and_source(config: ConfigFile) -> tuple[int, str]:
    """(head dimension, its source): `head_dim` (latent attention: `qk_rope_head_dim`), else the family's default in
    transformers, else hidden_size / num_attention_heads.
    """
    family = family_of(config)
    if family.rotated_key:
        keys = family.head_dim_key, family.rotated_key
        return sum(map(config.required_integer, keys)), config.where(" + ".join(keys))
    if family.head_dim_key != "head_dim":
        return config.required_integer(family.head_dim_key), config.where(family.head_dim_key)
    if config.values.get("qk_rope_head_dim") is not None:
        raise config.error(
            "qk_rope_head_dim",
            f"is {shown(config.values['qk_rope_head_dim'])}, but the latent attention of model_type "
            f"{shown(config.values.get('model_type'))} is unknown; known: {', '.join(LATENT)}",
        )
    given = config.integer("head_dim")
    if given is not None:
        return given, config.where("head_dim")
    if family.head_dim is not None:
        if "head_dim" in config.values:
            _refuse_null_head_dim(config, family.head_dim)
        return family.head_dim, f"transformers' default head_dim for {family.model_type}"
    hidden, heads = config.required_integer("hidden_size"), config.required_integer("num_attention_heads")
    if hidden % heads:
        raise config.error("hidden_size", f"{shown(hidden)} is not divisible by num_attention_heads {shown(heads)}")
    return hidden // heads, config.where("hidden_size / num_attention_heads")


def _refuse_null_head_dim(config: ConfigFile, default: int) -> None:
    """A head_dim of null is not an absent one, unless hidden_size / num_attention_heads is the family's default too."""
    hidden, heads = config.required_integer("hidden_size"), config.required_integer("num_attention_heads")
    if hidden != default * heads:
        raise config.error(
            "head_dim",
            f"is null, which transformers refuses; without the key it is {default}, and hidden_size / num_attention_heads is "
            f"{hidden / heads:g}: write it",
        )


def rotated_dim(config: ConfigFile, in_block: tuple[str, object], alone: bool = False) -> tuple[int, str]:
    """(D, its source): the head dimension times the partial rotary factor, rounded down as transformers does.

    in_block: (place, value) of the block's own partial_rotary_factor; the value is None if the block has none. alone: the config's
    own factor is the default of blocks by layer type, and this block has one.
    """
    head, source = head_dim_and_source(config)
    family = family_of(config)
    spots = [in_block] + [(config.where(k), config.values.get(k)) for k in ("partial_rotary_factor", "rotary_pct")]
    spots = spots[:1] if alone else spots
    given: list[tuple[str, int]] = []
    for place, value in spots:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise YarnEdgeError(f"{place} is {shown(value)}, expected a number above 0, up to 1")
        given.append((f"{source} * {place} {value:g}", int(head * value)))
    for key in ("rotary_dim", family.rotated_key):
        rotary_dim = config.integer(key)
        if rotary_dim is not None:
            given.append((config.where(key), rotary_dim))
    if len({dim for _place, dim in given}) > 1:
        sides = " and ".join(f"{place} makes it {shown(dim)}" for place, dim in given)
        raise YarnEdgeError(f"{config.name}: rotated dimensions: {sides}: which one is right?")
    if given:
        place, dim = given[0]
    else:
        dim, place = int(head * family.partial), source
        if family.partial != 1:
            place += f" * transformers' partial_rotary_factor for {family.model_type} {family.partial:g}"
    if not 0 < dim <= head:
        raise YarnEdgeError(f"{place} makes {shown(dim)} rotated dimensions in a head of {shown(head)}")
    return dim, source if dim == head else place
