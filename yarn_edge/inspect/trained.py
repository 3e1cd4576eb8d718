"""Was a checkpoint trained with the scaling that its config claims? What its files, and those of its base, can say for certain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import Positions, read_positions
from yarn_edge.checkpoint.same_weights import compare_query_keys
from yarn_edge.checkpoint.trained_length import trained_length
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS, NO_OVERRIDES, ScalingOverrides
from yarn_edge.inspect.findings import Finding
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.progress import note

MEASURE = "measure what the scaling does: yarn-edge verify MODEL.gguf --effect TEXT"


def training_findings(folder: Path, parts: Mapping[str, RopeScaling]) -> Iterator[Finding]:
    """A scaling whose reach no sequence in training had."""
    length, scaled = trained_length(folder), _scaled(parts)
    if length is None or scaled is None or length.tokens > scaled.original_context:
        return
    yield Finding(
        "reach never trained",
        f"the config's {scaled.method} reaches {scaled.extended_context} tokens, but no sequence in training went beyond the original "
        f"context of {scaled.original_context}",
        f"{length.source} ({length.trainer})",
        MEASURE,
    )


def with_base(folder: Path, base: Path, overrides: ScalingOverrides = NO_OVERRIDES) -> Positions:
    """`read_positions`; where the config lost the base of the rotation, the error names that of the base model."""
    try:
        return read_positions(read_config(folder), overrides)
    except YarnEdgeError as error:
        theirs = _first(read_positions(read_config(base)).parts)
        if "rope_theta is null" not in str(error):
            raise
        raise YarnEdgeError(
            f"{error}; {base} has {theirs.rope_theta:g} ({theirs.source('rope_theta')}): {FLAGS['rope_theta']} {theirs.rope_theta:g}"
        ) from error


def base_findings(folder: Path, base: Path, parts: Mapping[str, RopeScaling]) -> Iterator[Finding]:
    """What sets a checkpoint's positions apart from its base's, if that is certain to be a mistake or untrained."""
    ours, theirs = _first(parts), _first(read_positions(read_config(base)).parts)
    if abs(ours.rope_theta / theirs.rope_theta - 1) > SAME_RELATIVE:
        yield Finding(
            "another base of the rotation",
            f"rope_theta is {ours.rope_theta:g}, the base model's is {theirs.rope_theta:g}: trainers lose the key, and a default takes its "
            "place",
            f"{ours.source('rope_theta')}; {base.name}: {theirs.source('rope_theta')}",
            f"if it was not trained so: {FLAGS['rope_theta']} {theirs.rope_theta:g}",
        )
    scaled = _scaled(parts)
    if scaled is None or not scaled.differences(theirs):
        return
    weights = compare_query_keys(folder, base)
    if weights is None:
        note(
            f"note: whether training changed queries and keys is not known: {folder.name} and {base.name} do not both have them as "
            "safetensors, by the same names, types and sizes"
        )
    elif weights.changed is None:
        yield Finding(
            "claimed, never trained",
            f"the config has {scaled.method} with factor {scaled.factor:g}, the base model has not, and no weight of queries or keys was "
            "changed: nothing was trained with it",
            f"{weights.compared} of {weights.compared} weights of queries and keys are those of {base.name}, bit by bit",
            MEASURE,
        )


def _first(parts: Mapping[str, RopeScaling]) -> RopeScaling:
    return parts.get("full_attention") or next(iter(parts.values()))


def _scaled(parts: Mapping[str, RopeScaling]) -> RopeScaling | None:
    """The scaling that reaches beyond its original context, if there is one."""
    scaling = _first(parts)
    return scaling if scaling.extended_context > scaling.original_context and scaling.factor > 1 else None
