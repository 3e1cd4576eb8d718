"""How each layer of a GGUF is rotated: as full attention, as a sliding window with its own rules, or not at all.

Most architectures rotate every layer alike. `yarn_edge.llama_rules.honoured` has the rules of the others; they are applied here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import (
    DEFAULT_FREQ_BASE,
    RuntimeArguments,
    file_base,
    file_factor,
    has_sliding,
    number_or,
    recurs,
    simulate,
    slides,
    unturned_pairs,
)
from yarn_edge.llama_rules.honoured import Honoured, honoured
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

Kind = Literal["full", "sliding", "unrotated"]


def layer_kinds(file: GGUFFile, n_layer: int) -> list[Kind]:
    """How each of `n_layer` layers is rotated."""
    row = honoured(file.architecture)
    return [_kind(row, file, layer) for layer in range(n_layer)]


def _kind(row: Honoured, file: GGUFFile, layer: int) -> Kind:
    sliding = slides(file, layer)
    if row.unrotated == "every 4th" and layer % 4 == 3:
        return "unrotated"
    if row.unrotated == "full attention" and row.sliding is not None and not sliding:
        return "unrotated"
    if row.unrotated == "linear attention" and recurs(file, layer):
        return "unrotated"
    return "sliding" if sliding else "full"


def running(file: GGUFFile, arguments: RuntimeArguments, factors: tuple[float, ...] | None) -> RopeScaling:
    """What is computed in layers with full attention, in a context made with `arguments`. factors: values of `rope_freqs.weight`."""
    plain, live = simulate(file, arguments, factors), arguments.live
    if live is None:
        return plain
    stopped = unturned_pairs(file, plain.dim)  # a table divides the position, and theirs is 0
    full = live.full if stopped is None else replace(live.full, frequency_factors=stopped)
    return replace(full, softmax_factor=plain.softmax_factor)


def running_sliding(
    file: GGUFFile, arguments: RuntimeArguments, factors: tuple[float, ...] | None
) -> RopeScaling | None:
    """`running` in layers with a sliding window; None if there are none."""
    own, live = sliding_scaling(file, simulate(file, arguments, factors)), arguments.live
    return own if own is None or live is None or live.sliding is None else live.sliding


def sliding_scaling(file: GGUFFile, full: RopeScaling) -> RopeScaling | None:
    """The scaling of layers with a sliding window if the others have `full`; None if there are no such layers."""
    rule = honoured(file.architecture).sliding
    if rule is None or not has_sliding(file):
        return None
    own = file.number("rope.freq_base_swa")
    base = {"model": full.rope_theta, "file": own or file_base(file), "10000": own or DEFAULT_FREQ_BASE}[rule.base]
    factor = {"model": full.factor, "file": file_factor(file) or 1.0, "one": 1.0}[rule.scale]
    dim = int(number_or(file.number("rope.dimension_count_swa"), full.dim)) if rule.own_dims else full.dim
    if not rule.yarn or full.method != "yarn":
        method: Literal["linear", "none"] = "linear" if factor != 1 else "none"
        attention = full.attention_factor if rule.yarn else 1.0
        return replace(
            full, method=method, rope_theta=base, factor=factor, dim=dim, attention_factor=attention, ext_factor=1.0
        )
    # The graph passes A without full attention's 0.1 ln s + 1; ggml multiplies by that of these layers.
    attention = full.attention_factor / yarn_attention_factor(full.factor) * yarn_attention_factor(factor)
    return replace(full, rope_theta=base, factor=factor, dim=dim, attention_factor=attention)
