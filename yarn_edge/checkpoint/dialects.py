"""The dialects in which checkpoints describe their positions, as rows of data, and how each is recognized.

A row says where the block is (`rope_parameters` in transformers v5, `rope_scaling` before that and in the Nous code) and what
`attn_factor` means. `ROPE_TYPES` has the rope types with the keys that each reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile as ConfigFile
from yarn_edge.checkpoint.config_file import shown
from yarn_edge.checkpoint.families import head_dim as head_dim
from yarn_edge.errors import one_line
from yarn_edge.positions.scaling import Method

_REACH = frozenset({"factor", "original_max_position_embeddings", "finetuned"})
_YARN = _REACH | {
    "attention_factor",
    "attn_factor",
    "extrapolation_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


@dataclass(frozen=True)
class RopeType:
    """One value of `rope_type`. method: what it means; None, with a reason, if it cannot be represented.

    keys: those it reads besides PLAIN_KEYS. log_multiplier: A = log_multiplier ln s + 1, regardless of the dialect.
    """

    method: Method | None
    keys: frozenset[str] = frozenset()
    reason: str = ""
    log_multiplier: float | None = None
    requires_original: bool = False


PLAIN_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_LONGROPE = RopeType("longrope", (_REACH | {"short_factor", "long_factor", "attention_factor"}) - {"finetuned"})
ROPE_TYPES: dict[str, RopeType] = {
    "default": RopeType("none"),
    "none": RopeType("none"),
    "linear": RopeType("linear", _REACH),
    "yarn": RopeType("yarn", _YARN),
    # Some runtimes' name for DeepSeek's form. mscale and mscale_all_dim make the difference, not the name.
    "deepseek_yarn": RopeType("yarn", _YARN),
    # vLLM's telechat3_scaling_rope.py: 0.07 ln s + 1 and no mscale.
    "telechat3-yarn": RopeType(
        "yarn", _YARN - {"mscale", "mscale_all_dim"}, log_multiplier=0.07, requires_original=True
    ),
    "dynamic": RopeType("dynamic-ntk", _REACH),
    "dynamic-yarn": RopeType("dynamic-yarn", _YARN),
    "llama3": RopeType("llama3", (_REACH | {"low_freq_factor", "high_freq_factor"}) - {"finetuned"}),
    "longrope": _LONGROPE,
    "su": _LONGROPE,
    "mrope": RopeType(None, reason="multimodal RoPE is not supported"),
    "proportional": RopeType(None, reason="frequencies of zero beyond a proportion of the pairs are not supported"),
}
KNOWN_KEYS = frozenset().union(PLAIN_KEYS, *(t.keys for t in ROPE_TYPES.values()))


@dataclass(frozen=True)
class Dialect:
    """How one code base reads the block.

    attn_factor_multiplies: the Nous code's attn_factor multiplies 0.1 ln s + 1; transformers ignores that key. unread: keys that
    this code ignores and another one reads; `yarn_edge.checkpoint.readings` compares what the two make of them. own_mscales:
    the code has defaults for mscale and mscale_all_dim (1 and 0) where transformers ignores a single one.
    """

    name: str
    block: str
    log_multiplier: float = 0.1
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attn_factor_multiplies: bool = False
    requires_original: bool = False
    own_mscales: bool = False
    unread: frozenset[str] = frozenset()


_NOT_TRANSFORMERS = frozenset({"attn_factor", "extrapolation_factor"})


def _nous(name: str, log_multiplier: float, beta_fast: float, beta_slow: float) -> Dialect:
    return Dialect(
        name,
        "rope_scaling",
        log_multiplier,
        beta_fast,
        beta_slow,
        attn_factor_multiplies=True,
        requires_original=True,
        unread=frozenset({"attention_factor", "mscale", "mscale_all_dim", "truncate"}),
    )


TRANSFORMERS_V5 = Dialect("transformers v5", "rope_parameters", unread=_NOT_TRANSFORMERS)
TRANSFORMERS_V4 = Dialect("transformers v4", "rope_scaling", unread=_NOT_TRANSFORMERS)
NOUS_LLAMA = _nous("Nous Llama", 0.1, 32.0, 1.0)
# modeling_mistral_yarn.py: _yarn_get_mscale has 0.07, and the rotary classes default to beta_fast=128, beta_slow=2.
NOUS_MISTRAL = _nous("Nous Mistral", 0.07, 128.0, 2.0)
# modeling_deepseek.py: m(mscale) / m(mscale_all_dim) with defaults 1 and 0.
DEEPSEEK_CODE = Dialect("DeepSeek", "rope_scaling", own_mscales=True, unread=_NOT_TRANSFORMERS)
MISTRAL_PARAMS = Dialect("Mistral params.json", "yarn")
# The module that auto_map names (or that is in the checkpoint's folder), and its dialect.
REMOTE_CODE: dict[str, Dialect] = {
    "modeling_llama_yarn": NOUS_LLAMA,
    "modeling_llama_together_yarn": NOUS_LLAMA,
    "modeling_mistral_yarn": NOUS_MISTRAL,
    "modeling_deepseek": DEEPSEEK_CODE,
}
# A checkpoint's own code whose positions equal those of transformers' class. Only auto_map counts, not a file's name.
NATIVE_CODE = frozenset(
    {
        "modeling_bailing_moe_v2",  # calls transformers' functions
        "modeling_phi3",
        "modeling_flash_llama",
        "modeling_internlm2",
        "modeling_laguna",
        "modeling_telechat3",
    }
)


def same(a: object, b: object) -> bool:
    """Whether two JSON values are equal; False if they are nested too deeply to compare."""
    try:
        return bool(a == b)
    except RecursionError:
        return False


def text_section(config: ConfigFile) -> ConfigFile:
    """The part of the config that describes positions: `text_config` of a multimodal model, else the config itself."""
    text = config.section("text_config")
    if text is None:
        return config
    for key in ("rope_parameters", "rope_scaling", "rope_theta"):
        outer, inner = config.values.get(key), text.values.get(key)
        if outer is not None and not same(outer, inner):
            raise config.error(key, f"is {shown(outer)} and {text.prefix}{key} is {shown(inner)}: remove the wrong one")
    return text


def _blocks(text: ConfigFile) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """(rope_parameters, rope_scaling); an empty one beside the other counts as absent, as in transformers."""
    v5, v4 = (None if (s := text.section(key)) is None else s.values for key in ("rope_parameters", "rope_scaling"))
    if v5 and v4 is not None and not v4:
        return v5, None
    return (None, v4) if v4 and v5 is not None and not v5 else (v5, v4)


def one_block_each(config: ConfigFile) -> tuple[ConfigFile, ...]:
    """The configs without rope_scaling and without rope_parameters, if it has both and they are written differently; else ()."""
    if config.short == "params.json":
        return ()
    text = text_section(config)
    v5, v4 = _blocks(text)
    if v5 is None or v4 is None or same(v5, v4):
        return ()

    def without(key: str) -> ConfigFile:
        values = {k: v for k, v in config.values.items() if k != key}
        if text is not config:
            values["text_config"] = {k: v for k, v in text.values.items() if k != key}
        return replace(config, values=values)

    return without("rope_scaling"), without("rope_parameters")


def recognise(config: ConfigFile) -> Dialect:
    """The dialect of this config."""
    if config.short == "params.json":
        return MISTRAL_PARAMS
    text = text_section(config)
    v5, v4 = _blocks(text)
    dialect = _remote_code(config)
    if dialect is not None:
        if v5 is not None and v4 is None:
            if not dialect.attn_factor_multiplies:
                return TRANSFORMERS_V5
            raise text.error(
                "rope_parameters",
                f"is not read by the {dialect.name} code, which this checkpoint names: rename the block to rope_scaling",
            )
        return dialect
    if v5 is not None:
        return TRANSFORMERS_V5
    return NOUS_LLAMA if v4 is not None and "finetuned" in v4 else TRANSFORMERS_V4


def _remote_code(config: ConfigFile) -> Dialect | None:
    """The dialect of the checkpoint's own code; None if it has none, or if transformers' class computes the same."""
    auto_map = config.values.get("auto_map")
    named = auto_map if isinstance(auto_map, dict) else {}
    texts = {key: value[:200] if isinstance(value, str) else shown(value) for key, value in named.items()}
    modules = {key: text.rsplit("--", 1)[-1].split(".")[0] for key, text in texts.items()}
    for module in (*modules.values(), *(name[:-3] for name in sorted(config.siblings))):
        if module in REMOTE_CODE:
            return REMOTE_CODE[module]
    own = modules.get("AutoModelForCausalLM")
    if own is not None and own not in NATIVE_CODE:
        raise config.error(
            "auto_map",
            f"names the checkpoint's own code {one_line(own, 80)}, whose positions are unknown: if transformers' class "
            "computes the same, remove auto_map",
        )
    return None
