"""Which family a checkpoint is, and what its row says about this checkpoint: sizes, keys and tensors, all checked.

All differences between families are data in their rows: no code below looks at a family's name.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from yarn_edge.checkpoint.config_file import MAX_INTEGER, ConfigFile, is_whole, shown
from yarn_edge.checkpoint.dialects import head_dim
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.positions.scaling import MAX_NUMBER

from .deepseek import DEEPSEEK
from .dense import DENSE
from .experts import EXPERTS
from .linear import LINEAR_ATTENTION
from .rows import Architecture, Constant, NumberRow, TensorRow, Wrapper, flag_of, value_of
from .sigmoid import SIGMOID_ROUTERS
from .sizes import ModelSizes, Size
from .sliding import SLIDING_WINDOWS
from .windows import window_of, windowed_layers

ARCHITECTURES: tuple[Architecture, ...] = (
    *DENSE,
    *EXPERTS,
    *SLIDING_WINDOWS,
    *DEEPSEEK,
    *SIGMOID_ROUTERS,
    *LINEAR_ATTENTION,
)


def architecture_of(config: ConfigFile) -> tuple[Architecture, Wrapper | None]:
    """The row for a checkpoint, by `architectures`, else by `model_type`, and the class around it if it has one.

    Raises YarnEdgeError for an unknown family.
    """
    names = config.values.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = config.values.get("model_type")
    for row in ARCHITECTURES:
        if name == row.hf_name and model_type not in (None, *row.model_types):
            raise config.error(
                "model_type",
                f"is {one_line(repr(model_type), 60)}, but architectures says {name}: transformers uses the "
                "former; correct one of them",
            )
        if name == row.hf_name or (name is None and model_type in row.model_types):
            return row, None
    given = name if name is not None else model_type
    known = ", ".join(row.hf_name for row in ARCHITECTURES)
    pairs = [(row, wrapper) for row in ARCHITECTURES for wrapper in row.wrappers]
    around = [pair for pair in pairs if given in (pair[1].hf_name, pair[1].model_type)]
    if around:
        return _inside(config, around)
    raise config.error(
        "architectures", f"is {one_line(repr(given), 80)}, which convert does not support; it supports {known}"
    )


def _inside(config: ConfigFile, around: list[tuple[Architecture, Wrapper]]) -> tuple[Architecture, Wrapper]:
    """The one of `around` that the text_config names."""
    text = config.section("text_config")
    if text is None:
        raise config.error("text_config", "is missing: it describes the language model")
    model_type = text.values.get("model_type")
    for row, wrapper in around:
        if model_type in row.model_types:
            return row, wrapper
    known = ", ".join(row.model_type for row, _wrapper in around)
    raise text.error(
        "model_type", f"is {one_line(repr(model_type), 60)}: inside {around[0][1].hf_name} convert supports {known}"
    )


def language_config(config: ConfigFile, wrapper: Wrapper | None) -> ConfigFile:
    """The config of the language model: the whole one, or its text_config with what only the class around it states."""
    text = config.section("text_config") if wrapper else None
    if text is None:
        return config
    outer = {key: config.values[key] for key in ("tie_word_embeddings",) if key in config.values}
    return replace(text, values={**text.values, **outer})


def model_sizes(row: Architecture, config: ConfigFile) -> ModelSizes:
    """The hyper-parameters. Raises YarnEdgeError if they contradict each other, or llama.cpp cannot run them."""
    for key in row.stated:
        if config.values.get(key) is None:
            raise config.error(
                key, "is missing, and transformers does not know this family: write what its own code uses"
            )
    fixed = {key: constant for key, constant in row.constants.items() if not callable(constant.value)}
    for key, constant in fixed.items():
        _check_constant(row, config, key, constant.value, constant)
    if row.windows is None:
        _check_layer_types(row, config)
    n_head = config.required_integer("num_attention_heads")
    sizes = ModelSizes(
        config.required_integer("num_hidden_layers"),
        config.required_integer("hidden_size"),
        _stated(row, config, Size(("intermediate_size",), optional=not row.has("ffn"))),
        n_head,
        config.integer("num_key_value_heads") or n_head,
        head_dim(config),
        config.required_integer("vocab_size"),
        {name: _stated(row, config, size) for name, size in row.sizes.items()},
    )
    sizes = _with_layers(row, config, sizes)
    n_head = sizes.n_head
    for layer in range(sizes.n_layer) if sizes.by_layer else (None,):
        heads = sizes.in_layer(layer)
        if heads.n_head % heads.n_kv_head:
            raise config.error(
                "num_key_value_heads",
                f"is {heads.n_kv_head}, which does not divide num_attention_heads, {heads.n_head}",
            )
    if sizes.head_dim % 2:
        raise config.error("head_dim", f"is {sizes.head_dim}: RoPE needs an even number")
    if row.width_is_heads and sizes.head_dim * sizes.n_head != sizes.hidden:
        raise config.error(
            "head_dim",
            f"is {sizes.head_dim} with {n_head} heads and hidden_size {sizes.hidden}: "
            f"llama.cpp runs {row.gguf} only if heads * head_dim is the hidden size",
        )
    used, experts = sizes.others.get("experts_used", 0), sizes.others.get("experts", 0)
    if used > experts:
        raise config.error(row.sizes["experts_used"].keys[0], f"is {used}, more than the {experts} experts")
    for key in row.constants.keys() - fixed.keys():
        constant = row.constants[key]
        _check_constant(row, config, key, constant.expected(sizes), constant)
    for rule in row.impossible:
        if rule.when(sizes):
            raise config.error(rule.key, f"is {shown(config.values.get(rule.key))}: {rule.why}")
    key, _gguf = row.epsilon
    eps = value_of(row, config, key)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise config.error(key, f"is {one_line(repr(eps), 60)}, not a number between 0 and 1")
    return sizes


def _check_constant(row: Architecture, config: ConfigFile, key: str, expected: Any, constant: Constant) -> None:
    if constant.optional and config.values.get(key) is None:
        return
    value = flag_of(row, config, key) if isinstance(expected, bool) else value_of(row, config, key)
    if value is None and expected is not None:
        raise config.error(key, f"is null, which transformers fails on: write {expected!r}")
    if value is not None and value != expected:
        what = f"is {one_line(repr(value), 80)}: only {one_line(repr(expected), 80)} can be converted"
        raise config.error(key, f"{what}: {constant.why}" if constant.why else what)


def _stated(row: Architecture, config: ConfigFile, size: Size) -> int:
    """A size under whichever of its keys the config has; the family's default if it has none."""
    keys = size.keys
    given = {key: value for key in keys if (value := config.integer(key)) is not None}
    if len(set(given.values())) > 1:
        first, *others = given
        raise config.error(first, f"is {given[first]}, but {others[0]} is {given[others[0]]}: correct one of them")
    if given:
        return next(iter(given.values()))
    default = None if any(key in config.values for key in keys) else row.defaults.get(keys[0])
    if default is None and not size.optional:
        return config.required_integer(keys[0])
    return int(default or 0)


def _with_layers(row: Architecture, config: ConfigFile, sizes: ModelSizes) -> ModelSizes:
    """The sizes with those that the config lists by layer."""
    by_layer: dict[str, Any] = {}
    for name, key in row.by_layer.items():
        numbers = config.values.get(key)
        if numbers is None:
            continue
        if not isinstance(numbers, list) or len(numbers) != sizes.n_layer or not all(map(_is_size, numbers)):
            raise config.error(key, f"is {shown(numbers)}, expected {sizes.n_layer} whole numbers, one for each layer")
        by_layer[name] = tuple(numbers)
    largest = {name: max(numbers) for name, numbers in by_layer.items()}
    return replace(sizes, **largest, by_layer=by_layer)


def _is_size(value: Any) -> bool:
    return is_whole(value) and 0 < value <= MAX_INTEGER


def _check_layer_types(row: Architecture, config: ConfigFile) -> None:
    types = config.values.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(t not in row.layer_types for t in types)):
        known = " or ".join(row.layer_types)
        raise config.error("layer_types", f"is {one_line(repr(types), 80)}: only {known} can be converted")


def hyper_parameters(row: Architecture, config: ConfigFile, sizes: ModelSizes, context_length: int) -> dict[str, Any]:
    """The `{arch}.*` keys under llama.cpp's names, without those of RoPE."""
    keys: dict[str, Any] = {
        "block_count": sizes.n_layer,
        "context_length": context_length,
        "embedding_length": sizes.hidden,
        "feed_forward_length": sizes.by_layer.get("ffn", sizes.ffn or None),
        "attention.head_count": sizes.by_layer.get("n_head", sizes.n_head),
        "attention.head_count_kv": sizes.by_layer.get("n_kv_head", sizes.n_kv_head),
        "attention.key_length": sizes.head_dim,
        "attention.value_length": sizes.head_dim,
        row.epsilon[1]: float(value_of(row, config, row.epsilon[0])),
        "vocab_size": sizes.vocab,
        **{size.gguf: sizes.others[name] for name, size in row.sizes.items() if size.gguf and sizes.others[name]},
    }
    for number in row.numbers:
        value = _number(row, config, number)
        if value is not None:
            keys[number.key] = value
    sliding = windowed_layers(row, config, sizes)
    if sliding:
        keys["attention.sliding_window"] = window_of(row, config)
        keys["attention.sliding_window_pattern"] = sliding
    keys |= {key: value(config, sizes) if callable(value) else value for key, value in row.keys.items()}
    return {f"{row.gguf}.{name}": value for name, value in keys.items() if value is not None}


def _number(row: Architecture, config: ConfigFile, number: NumberRow) -> float | None:
    """The value of a number row; None if it is optional and not there."""
    block, _, key = number.source.rpartition(".")
    section = config.section(block) if block else config
    if section is None:
        raise config.error(block, "is missing: add it")
    value = section.values[key] if key in section.values else row.defaults.get(number.source)
    if value is None and number.optional:
        return None
    lowest = value == 0 if number.zero else False
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (lowest or 0 < value < MAX_NUMBER):
        given = shown(value) if key in section.values else "missing"
        raise section.error(key, f"is {given}, expected a number {'from' if number.zero else 'above'} 0")
    return float(value)


def tensor_rows(row: Architecture, config: ConfigFile, sizes: ModelSizes) -> list[TensorRow]:
    """Every tensor to write, in that order, with {i} filled in."""

    def wanted(condition: str) -> bool:
        key = condition.removeprefix("!")
        return not condition or flag_of(row, config, key) != condition.startswith("!")

    rows = [r for r in row.tensors if wanted(r.when)]
    kinds = {name: of(config, sizes) for name, of in row.layers.items()}

    def stands(r: TensorRow, layer: int) -> bool:
        return not r.layers or kinds[r.layers.removeprefix("!")][layer] != r.layers.startswith("!")

    whole = [r for r in rows if "{i}" not in r.source]
    per_layer = [r for r in rows if "{i}" in r.source]
    return whole + [r.in_layer(i) for i in range(sizes.n_layer) for r in per_layer if stands(r, i)]


def unknown_tensor(source: str, name: str) -> YarnEdgeError:
    """The error for a tensor that no row uses: it must not be dropped silently."""
    return YarnEdgeError(
        f"{source}: tensor {one_line(name, 120)} has no place in the GGUF: if the model does without it (transformers loads it "
        "then, and save_pretrained leaves the tensor out), remove it from the checkpoint"
    )
