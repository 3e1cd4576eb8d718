"""The dialects in which checkpoints describe their positions, as rows of data, and how each is recognised.

Where the block stands (`rope_parameters` in transformers v5, `rope_scaling` before and in the Nous code), which rope types
there are and which can be represented, and what `attn_factor` means to whose code.
"""

from __future__ import annotations

from dataclasses import dataclass

from yarn_edge.config_file import ConfigFile
from yarn_edge.errors import one_line
from yarn_edge.scaling import Method

# type in the config -> (method, or None with the reason why it cannot be represented)
ROPE_TYPES: dict[str, tuple[Method | None, str]] = {
    "default": ("none", ""),
    "none": ("none", ""),
    "linear": ("linear", ""),
    "yarn": ("yarn", ""),
    "dynamic": (None, "its angles depend on the current length, llama.cpp's do not"),
    "dynamic-yarn": (None, "its angles depend on the current length, llama.cpp's do not"),
    "llama3": (None, "it is not YaRN but Llama 3's own scaling, which is not supported yet"),
    "longrope": (None, "it is not YaRN but LongRoPE, which is not supported yet"),
    "su": (None, "it is not YaRN but LongRoPE, which is not supported yet"),
    "deepseek_yarn": (None, "DeepSeek's form of YaRN is not supported yet"),
    "telechat3-yarn": (None, "TeleChat's form of YaRN is not supported yet"),
    "mrope": (None, "multimodal RoPE is not supported"),
    "proportional": (None, "it is not supported yet"),
}


@dataclass(frozen=True)
class Dialect:
    """How one family of code reads the block."""

    name: str
    block: str
    log_multiplier: float = 0.1
    # The Nous code's attn_factor multiplies 0.1 ln s + 1; transformers does not know the key and would ignore it.
    attn_factor_multiplies: bool = False
    requires_original: bool = False


TRANSFORMERS_V5 = Dialect("transformers v5", "rope_parameters")
TRANSFORMERS_V4 = Dialect("transformers v4", "rope_scaling")
NOUS_LLAMA = Dialect("Nous Llama", "rope_scaling", 0.1, attn_factor_multiplies=True, requires_original=True)
NOUS_MISTRAL = Dialect("Nous Mistral", "rope_scaling", 0.07, attn_factor_multiplies=True, requires_original=True)
# The module that auto_map names (or that lies beside config.json) -> the dialect.
REMOTE_CODE: dict[str, Dialect] = {
    "modeling_llama_yarn": NOUS_LLAMA,
    "modeling_llama_together_yarn": NOUS_LLAMA,
    "modeling_mistral_yarn": NOUS_MISTRAL,
}


def recognise(config: ConfigFile) -> Dialect:
    """Which dialect this config speaks."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise config.error(key, f"is {one_line(repr(value), 60)}, not an object")
    has_v5, has_v4 = (config.values.get(k) is not None for k in ("rope_parameters", "rope_scaling"))
    if has_v5 and has_v4 and config.values["rope_parameters"] != config.values["rope_scaling"]:
        raise config.error(
            "rope_parameters", "and rope_scaling are both there and differ: remove the one that is not meant"
        )
    dialect = _remote_code(config)
    if dialect is not None:
        if has_v5 and not has_v4:
            raise config.error(
                "rope_parameters",
                f"is not read by the {dialect.name} code, which this checkpoint names: call the block rope_scaling",
            )
        return dialect
    if has_v5:
        return TRANSFORMERS_V5
    if has_v4 and "finetuned" in config.values["rope_scaling"]:
        return NOUS_LLAMA
    return TRANSFORMERS_V4


def _remote_code(config: ConfigFile) -> Dialect | None:
    """The dialect of the code that the checkpoint brings along, None where it brings none for the model itself."""
    auto_map = config.values.get("auto_map")
    named = auto_map if isinstance(auto_map, dict) else {}
    modules = {key: str(value).rsplit("--", 1)[-1].split(".")[0] for key, value in named.items()}
    for module in (*modules.values(), *(name[:-3] for name in sorted(config.siblings))):
        if module in REMOTE_CODE:
            return REMOTE_CODE[module]
    own = modules.get("AutoModelForCausalLM")
    if own is not None:
        raise config.error(
            "auto_map",
            f"names the checkpoint's own code {one_line(own, 80)}, whose positions are not known: if transformers' class "
            "computes the same, remove auto_map",
        )
    return None


def head_dim(config: ConfigFile) -> int:
    """Dimensions of one attention head: `head_dim`, else hidden_size / num_attention_heads."""
    given = config.integer("head_dim")
    if given is not None:
        return given
    hidden, heads = config.required_integer("hidden_size"), config.required_integer("num_attention_heads")
    if hidden % heads:
        raise config.error("hidden_size", f"{hidden} is not divisible by num_attention_heads {heads}")
    return hidden // heads
