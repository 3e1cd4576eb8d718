"""A checkpoint's config as transformers takes it, for the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile, read_config
from yarn_edge.checkpoint.dialects import text_section
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.verify.dequantized import dequantize_in

# Values that yarn-edge takes however they are written, and transformers 5 only as whole numbers and booleans.
_WHOLE = (
    "max_position_embeddings",
    "original_max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
)
_NULLS = ("rope_theta", "original_max_position_embeddings")
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
# What a replaced block keeps: how much of a head is rotated, by which axes (the same in text), and how queries grow with positions.
_KEPT = ("partial_rotary_factor", "mrope_section", "mrope_interleaved", "llama_4_scaling_beta")


def transformers_config(folder: Path, replaced: RopeScaling | None) -> Any:
    """The checkpoint's config as transformers has it; 32768.0 becomes 32768 first, and 1 true, which it would refuse.

    With `replaced` its block goes, because transformers fails on some nulls that a flag settles.
    """
    import transformers

    file = read_config(folder)
    text = text_section(file)
    plain = _plain(text, replaced is not None)
    outer = {} if text is file else _plain(file, replaced is not None)
    if plain or outer:
        values = {k: v for k, v in {**text.values, **plain}.items() if v is not None or k not in plain}
        if text is not file:
            values = {**file.values, **outer, "text_config": values}
        config = transformers.AutoConfig.for_model(**values)
    else:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if replaced is not None:
        language = config.get_text_config()
        own = getattr(language, "rope_parameters", None) or {}
        kept = {key: own[key] for key in _KEPT if key in own}
        if "llama_4_scaling_beta" in kept:
            kept["original_max_position_embeddings"] = replaced.original_context
        language.rope_parameters = {"rope_type": "default", "rope_theta": replaced.rope_theta, **kept}
    dequantize_in(config, file)
    return config


def _plain(section: ConfigFile, nulls: bool) -> dict[str, Any]:
    """The values of a part of the config that transformers would refuse, as it takes them. nulls: those that it fails on too."""
    plain: dict[str, Any] = {k: section.integer(k) for k in _WHOLE if isinstance(section.values.get(k), float)}
    plain |= {k: section.boolean(k) for k in _BOOLEANS if not isinstance(section.values.get(k, True), bool)}
    blocks = [
        section.values,
        *(b for key in ("rope_parameters", "rope_scaling") if isinstance(b := section.values.get(key), dict)),
    ]
    if nulls and any(key in b and b[key] is None for b in blocks for key in _NULLS):
        plain |= dict.fromkeys((*_NULLS, "rope_scaling", "rope_parameters"))
    return plain
