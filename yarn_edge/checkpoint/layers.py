"""Which block belongs to which layers, and what acts on positions besides rope.

transformers v5 nests the block by layer type. In some families a flat block is for the full-attention layers only.
"""

from __future__ import annotations

from collections.abc import Mapping

from yarn_edge.checkpoint.block import ORIGINAL, Block, the_one
from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.checkpoint.dialects import KNOWN_KEYS, TRANSFORMERS_V5, Dialect
from yarn_edge.checkpoint.families import FULL, LINEAR, SLIDING, Family, Windows
from yarn_edge.errors import YarnEdgeError

MAX_LAYERS = 10_000
MAX_LABELS = 16
# Layer types with rotation. Linear attention, convolutions and state spaces have no positions.
_ROTATED = frozenset({FULL, SLIDING, "chunked_attention"})
# A key of the config or of a block, and what it does to positions or attention.
NOTES: dict[str, str] = {
    "llama_4_scaling_beta": "queries are multiplied by 1 + beta ln(1 + floor(position / original context))",
    "attn_temperature_tuning": "queries of layers without rope grow with the position",
    "mrope_section": "images and videos are placed on three axes, text on one",
    "no_rope_layers": "some layers have no positions",
    "no_rope_layer_interval": "some layers have no positions",
    "sliding_window": "layers with a window attend only this many tokens back",
    "attn_logit_softcapping": "attention logits are capped",
    "query_pre_attn_scalar": "attention logits are divided by its square root instead of that of the head dimension",
}


def notes_of(config: ConfigFile, blocks: Mapping[str, Block | None]) -> list[str]:
    """A sentence for each key that acts on positions or attention besides rope."""
    places = [(config.where(key), config.values.get(key), key) for key in NOTES]
    places += [(b.where(key), b.values.get(key), key) for b in blocks.values() if b for key in NOTES]
    return [
        f"{where} {shown(value)}: {NOTES[key]}"
        for where, value, key in places
        if value is not None and value is not False and config.values.get(f"use_{key}") is not False
    ]


def used_layer_types(config: ConfigFile) -> frozenset[str]:
    """The layer types that the config's layer_types names; empty without such a list."""
    named = config.values.get("layer_types")
    if named is None:
        return frozenset()
    if not isinstance(named, list) or len(named) > MAX_LAYERS or not all(isinstance(n, str) for n in named):
        raise config.error("layer_types", f"is {shown(named)}, expected a list of up to {MAX_LAYERS} names")
    n_layer = config.integer("num_hidden_layers")
    if n_layer is not None and len(named) != n_layer:
        raise config.error("layer_types", f"names {len(named)} layers, but num_hidden_layers is {n_layer}: correct it")
    return frozenset(named)


def sliding_layers(config: ConfigFile, windows: Windows, n_layer: int) -> list[bool]:
    """Which of `n_layer` layers have a sliding window, by layer_types, else by a period."""
    types = config.values.get("layer_types")
    if types is None:
        period = next((n for key in windows.period_keys if (n := config.integer(key))), windows.period)
        return [bool(period) and (layer + 1) % period != 0 for layer in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or not {FULL, SLIDING}.issuperset(types):
        raise config.error(
            "layer_types", f"is {shown(types)}, expected full_attention or sliding_attention for {n_layer} layers"
        )
    return [kind == SLIDING for kind in types]


def linear_layers(config: ConfigFile, n_layer: int) -> list[bool]:
    """Which of `n_layer` layers have linear attention, by layer_types, else all but every full_attention_interval-th one."""
    types = config.values.get("layer_types")
    if types is None:
        period = config.integer("full_attention_interval") or 4
        return [(layer + 1) % period != 0 for layer in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or not {FULL, LINEAR}.issuperset(types):
        raise config.error(
            "layer_types", f"is {shown(types)}, expected full_attention or linear_attention for {n_layer} layers"
        )
    return [kind == LINEAR for kind in types]


def layer_blocks(config: ConfigFile, dialect: Dialect, family: Family) -> dict[str, Block | None]:
    """The blocks by layer type, or one named "" for all layers. The block is None if a layer type has no positions."""
    section = config.section(dialect.block)
    if family.default_block is not None and (
        section is None or (not section.values and dialect is not TRANSFORMERS_V5)
    ):
        raise config.error(
            dialect.block,
            f"is missing: transformers 5 then fills in its own scaling for {family.model_type}, and transformers 4 may not. "
            "Add rope_parameters with the scaling that the model was trained with; transformers' own is "
            f'{family.default_block}, plain RoPE is {{"rope_type": "default"}}',
        )
    values = section.values if section else {}
    whole = Block(config, dialect, family, values)
    layers = family.layers
    nested = any(isinstance(value, dict) and key not in KNOWN_KEYS for key, value in values.items())
    if not nested:
        if layers is None:
            return {"": whole}
        if not layers.flat or (values and dialect is TRANSFORMERS_V5):
            state = "has one block for all layers" if values else "is missing"
            raise config.error(
                dialect.block, f"{state}, but {family.model_type} reads one for each layer type: nest it"
            )
        return {FULL: whole, SLIDING: Block(config, dialect, family, {}, theta=_local_theta(config, dialect, family))}
    labels = [key for key, value in values.items() if value is None or isinstance(value, dict)]
    known = used_layer_types(config) | ({FULL, SLIDING} if layers else set())
    if len(labels) > MAX_LABELS:
        raise config.error(dialect.block, f"has {len(labels)} objects, more than {MAX_LABELS} layer types")
    for key, value in values.items():
        if key not in labels and not _repeated(key, value, values):
            raise whole.error(key[:60], f"is unknown here (value {shown(value)}) beside layer types")
    if not known.issuperset(labels):
        raise config.error(
            dialect.block,
            f"differs by layer type ({', '.join(labels)[:200]}), but layer_types names "
            f"{', '.join(sorted(known))[:200] or 'none'}: add layer_types, or state one block",
        )
    blocks: dict[str, Block | None] = {}
    for label in labels:
        inner = values[label]
        theta = _local_theta(config, dialect, family) if label == SLIDING and layers and layers.flat else None
        blocks[label] = None if inner is None else Block(config, dialect, family, inner, label, theta)
    for label in sorted((used_layer_types(config) & _ROTATED) - blocks.keys()):
        raise config.error(dialect.block, f"has no block for {label}, which layer_types names: add it")
    return blocks


def _repeated(key: str, value: object, values: Mapping[str, object]) -> bool:
    """Whether the original context beside layer types is that of every block that states one: transformers does not read it."""
    stated = [block[ORIGINAL] for block in values.values() if isinstance(block, dict) and ORIGINAL in block]
    return key == ORIGINAL and bool(stated) and all(one == value for one in stated)


def _local_theta(config: ConfigFile, dialect: Dialect, family: Family) -> tuple[str, float]:
    """(source, base) of the sliding layers if their block has none."""
    layers = family.layers
    assert layers is not None
    if layers.local_theta_key:
        given = the_one({config.where(layers.local_theta_key): config.values.get(layers.local_theta_key)})
        if given:
            return given
        if layers.local_theta_key in config.values:
            raise config.error(
                layers.local_theta_key,
                f"is null, which transformers fails on; without the key it is {layers.local_theta:g}: write the base of the sliding "
                "layers",
            )
    top = config.values.get("rope_theta")
    if layers.shared_theta and top is not None and top != layers.local_theta:
        raise YarnEdgeError(
            f"{config.where('rope_theta')} is {shown(top)}, which transformers 4 uses for the sliding layers too, and "
            f"transformers 5 does not (it uses {layers.local_theta:g}): state rope_parameters by layer type"
        )
    return (
        f"transformers' default for {family.model_type}, sliding layers ({dialect.block} is for the others)",
        layers.local_theta,
    )
