"""The model that is to be converted: a checkpoint, or one with adapters on it, read and checked without its weights' values.

Order of work: read the config into a RopeScaling and ask the simulation of llama.cpp whether a GGUF can carry it; put the adapters
on; match every tensor with a row of the family.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from yarn_edge.checkpoint.adapter import model_name
from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.dialects import head_dim
from yarn_edge.checkpoint.families import FULL
from yarn_edge.checkpoint.read import Positions, only_scaling, read_positions, table_parts
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import EXACT, NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.planner import RopePlan, plan_parts, plan_rope, plan_tables
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.progress import note

from .adapters.base import base_of
from .adapters.merge import AdaptedModel, with_adapters
from .adapters.requests import AdaptedCheckpoint
from .adapters.tokenizer import tokenizer_folder
from .adapters.told import notes_about, scaling_notes
from .checkpoint import Checkpoint, open_checkpoint
from .families.architectures import architecture_of, language_config, model_sizes
from .families.rows import Architecture, TensorRow
from .families.sizes import ModelSizes
from .families.windows import check_sliding_window
from .model_tensors import check_counts, language_model, match_tensors, name_inside, without_prediction


@dataclass(frozen=True)
class SourceModel:
    """The language model of a checkpoint. tokenizer: the folder that has it. adapted: what adapters changed, None without any."""

    name: str
    checkpoint: Checkpoint
    architecture: Architecture
    config: ConfigFile
    sizes: ModelSizes
    scaling: RopeScaling
    rope: RopePlan
    rows: list[TensorRow]
    tokenizer: Path
    adapted: AdaptedModel | None = None


def open_source_model(
    wanted: Path | AdaptedCheckpoint,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    remote: RemoteWeights | None = None,
) -> SourceModel:
    """remote: those of the folder's files that are on the Hub. Raises YarnEdgeError for anything that cannot be carried over."""
    asked = wanted if isinstance(wanted, AdaptedCheckpoint) else AdaptedCheckpoint(wanted, ())
    folders = [request.folder for request in asked.adapters]
    folder = base_of(asked)
    checkpoint = open_checkpoint(folder, folders, remote)
    row, wrapper = architecture_of(checkpoint.config)
    config = language_config(checkpoint.config, wrapper)
    checkpoint = without_prediction(language_model(checkpoint, wrapper), row, config)
    for text in checkpoint.notes:
        note(text)
    positions = read_positions(checkpoint.config, overrides)
    for text in (*positions.assumptions, *_replaced(checkpoint.config, positions, overrides)):
        note(f"note: {text}")
    scaling, rope_plan = _planned(row, config, positions, planner)
    if rope_plan.message:
        note(rope_plan.message)
    adapted, tokenizer, name = None, folder, model_name(folder)
    if asked.adapters:
        adapted = with_adapters(checkpoint, config, row, asked.adapters, partial(name_inside, wrapper))
        checkpoint, config = adapted.checkpoint, adapted.config
        told = notes_about(adapted.adapters, adapted.changes, folder, checkpoint.tensors)
        for text in (*adapted.notes, *told, *scaling_notes(folders, positions, bool(overrides))):
            note(text)
        tokenizer = tokenizer_folder(folder, folders)
        name = " + ".join([name, *(model_name(path) for path in folders)])
    check_sliding_window(row, config, scaling)
    check_counts(checkpoint, row, config)
    sizes = model_sizes(row, config)
    rows = match_tensors(replace(checkpoint, config=config), row, sizes, scaling)
    return SourceModel(name, checkpoint, row, config, sizes, scaling, rope_plan, rows, tokenizer, adapted)


def _replaced(config: ConfigFile, positions: Positions, overrides: ScalingOverrides) -> list[str]:
    """That flags take the place of a scaling that the config states, which is the one that the model was trained with."""
    if not overrides.fields:
        return []
    try:
        stated = read_positions(config).parts
    except YarnEdgeError:  # the flags supply what the config lacks
        return []
    scaled = [part for part in stated.values() if part.method != "none"]
    if not scaled or all(not part.differences(positions.parts.get(label, part)) for label, part in stated.items()):
        return []
    was = f"{scaled[0].method} factor {scaled[0].factor:g}"
    return [f"{config.name} states {was}, which the flags replace: the model was trained with what it states"]


def _planned(
    row: Architecture, config: ConfigFile, positions: Positions, planner: PlannerOptions
) -> tuple[RopeScaling, RopePlan]:
    """(the scaling, in layers with full attention if others have a sliding window; how the GGUF carries it)."""
    parts, tables = positions.parts, table_parts(positions.parts)
    as_it_is = plan_tables(*tables, row.gguf, planner) if tables else None
    if tables and as_it_is is not None:
        scaling = tables[1]
    else:
        scaling = parts[FULL] if row.windows and FULL in parts else only_scaling(config, positions)
    if scaling.dim != head_dim(config) and not honoured(row.gguf).partial_rotation:
        raise YarnEdgeError(
            f"{scaling.source('dim')}: {scaling.dim} of {head_dim(config)} dimensions are rotated, but llama.cpp runs {row.gguf} "
            "only if all are"
        )
    if as_it_is is not None:
        return scaling, as_it_is
    return scaling, plan_parts(parts, row.gguf, planner) if row.windows else plan_rope(scaling, row.gguf, planner)
