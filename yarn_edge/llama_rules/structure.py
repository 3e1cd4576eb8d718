"""Whether a GGUF and a checkpoint's config describe one model: its sizes, experts, windows and whatever else changes its results."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.checkpoint.families import FULL, LINEAR, SLIDING, WINDOWS
from yarn_edge.checkpoint.layers import linear_layers, sliding_layers, used_layer_types
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import recurs, slides
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.layers import layer_kinds
from yarn_edge.positions.scaling import SAME_RELATIVE

# Keys of the config and the keys that convert and llama.cpp's converter make of them: whole numbers of every model, ...
_SIZES: tuple[tuple[str, str], ...] = (
    ("num_hidden_layers", "block_count"),
    ("hidden_size", "embedding_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("intermediate_size", "feed_forward_length"),
    ("vocab_size", "vocab_size"),
)
# ... and numbers of some, after a dot if they are in a block.
_NUMBERS: tuple[tuple[str, str], ...] = (
    ("num_experts", "expert_count"),
    ("num_local_experts", "expert_count"),
    ("n_routed_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("moe_routed_scaling_factor", "expert_weights_scale"),
    ("linear_conv_kernel_dim", "ssm.conv_kernel"),
    ("linear_key_head_dim", "ssm.state_size"),
    ("linear_num_key_heads", "ssm.group_count"),
    ("linear_num_value_heads", "ssm.time_step_rank"),
    ("sliding_window", "attention.sliding_window"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("layer_norm_eps", "attention.layer_norm_epsilon"),
    ("rope_parameters.llama_4_scaling_beta", "attention.temperature_scale"),
    ("rope_scaling.llama_4_scaling_beta", "attention.temperature_scale"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("attention_multiplier", "attention.scale"),
    ("logits_scaling", "logit_scale"),
    ("logit_scale", "logit_scale"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
)
# Latent attention is written as one head of keys, whatever the config says.
_NOT_IN_LATENT = frozenset({"attention.head_count_kv"})


def other_structure(file: GGUFFile, config: ConfigFile) -> Iterator[str]:
    """What of `config`, that of the language model, is not in `file`, as sentences. Only what both state is compared.

    Raises YarnEdgeError for a value that no config may have.
    """
    latent = _NOT_IN_LATENT if file.number("attention.key_length_mla") is not None else frozenset()
    for source, name in _SIZES + _NUMBERS:
        block, _, key = source.rpartition(".")
        section = config.section(block) if block else config
        if section is None:
            continue
        theirs = section.integer(key) if (source, name) in _SIZES else section.values.get(key)
        ours = file.metadata.get(f"{file.architecture}.{name}")
        if isinstance(theirs, bool) or not isinstance(theirs, (int, float)) or isinstance(ours, np.ndarray):
            continue  # absent, or one number per layer
        ours = None if name in latent else file.number(name)
        if ours is None or any(abs(ours - n) <= SAME_RELATIVE * abs(n) for n in (theirs, theirs + _extra(file, name))):
            continue
        yield _other(section, key, f"is {shown(theirs)}, {file.architecture}.{name} of {file.path} is {ours:g}")
    yield from _other_layers(file, config)


def _extra(file: GGUFFile, name: str) -> float:
    """Layers for predicting further tokens, which block_count holds too."""
    return (file.number("nextn_predict_layers", 0) or 0) if name == "block_count" else 0


def _other_layers(file: GGUFFile, config: ConfigFile) -> Iterator[str]:
    """The first layer that has another kind of attention in the file, or another rotation."""
    n_layer = config.integer("num_hidden_layers")
    if n_layer is None or n_layer > (file.number("block_count") or 0):
        return
    used_layer_types(config)
    kinds = layer_kinds(file, n_layer)
    linear = honoured(file.architecture).unrotated == "linear attention"
    for layer, has in enumerate(_attention(config, n_layer, linear)):
        runs = LINEAR if linear and recurs(file, layer) else SLIDING if slides(file, layer) else FULL
        if has not in (None, runs):
            yield _other(config, "layer_types", f"makes layer {layer} {has}, {file.path} runs it as {runs}")
            break
    rotated = config.values.get("no_rope_layers")  # 1 is a layer with RoPE
    if not isinstance(rotated, list) or len(rotated) != n_layer:
        return
    for layer, turned in enumerate(rotated):
        if bool(turned) == (kinds[layer] == "unrotated"):
            runs = "without RoPE" if turned else "with RoPE"
            yield _other(config, "no_rope_layers", f"has {shown(turned)} for layer {layer}, {file.path} runs it {runs}")
            break


def _attention(config: ConfigFile, n_layer: int, linear: bool) -> list[str | None]:
    """The kind of attention of each layer; None where the config does not say. linear: whether the family has linear attention."""
    windows = WINDOWS.get(str(config.values.get("model_type")))
    if windows is not None:
        return [SLIDING if windowed else FULL for windowed in sliding_layers(config, windows, n_layer)]
    if linear:
        return [LINEAR if found else FULL for found in linear_layers(config, n_layer)]
    types = config.values.get("layer_types")
    named = types if isinstance(types, list) else []
    return [str(name) if name in (SLIDING, FULL) else None for name in named]


def _other(config: ConfigFile, key: str, what: str) -> str:
    return str(config.error(key, f"{what}: this is another model's checkpoint"))
