"""`yarn-edge patch`: repair or add scaling in an existing GGUF. The weights are copied byte for byte.

What the file should run comes from its own description, from a checkpoint, or from flags. The planner decides how a file of
this architecture can carry it, and `yarn_edge.gguf.edit` rewrites the header. The result is read back and checked before it
gets its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.checkpoint.config_file import is_mistral_params, read_config
from yarn_edge.checkpoint.dialects import text_section
from yarn_edge.checkpoint.read import read_positions, table_parts
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import (
    EXACT,
    NO_OVERRIDES,
    PlannerOptions,
    ScalingOverrides,
    add_planner_flags,
    add_scaling_flags,
    planner_options,
    scaling_overrides,
)
from yarn_edge.gguf.edit_shards import edit_gguf_files, output_files, partial_files, publish_files, shards_bytes
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.contradictions import foreign_keys
from yarn_edge.llama_rules.description import CANONICAL, canonical_keys
from yarn_edge.llama_rules.effective import rotated_dims
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import CHECKPOINT_ARCHITECTURES, honoured, table_name
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.planner import RopePlan, plan_parts
from yarn_edge.llama_rules.rescale import file_parts
from yarn_edge.llama_rules.structure import other_structure
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.progress import bar, note
from yarn_edge.stdout import write_json, write_text
from yarn_edge.writer import check_space

PARAMS_ARCHITECTURES = (
    "llama",
    "mistral3",
)  # what becomes of a folder that has Mistral's params.json and no model_type


def from_checkpoint(file: GGUFFile, folder: Path, overrides: ScalingOverrides) -> Mapping[str, RopeScaling]:
    """The scaling of the checkpoint that `file` was made from, by layer type if it differs, else under "".

    Raises YarnEdgeError if the file was made from another checkpoint.
    """
    config = read_config(folder)
    architecture = CHECKPOINT_ARCHITECTURES.get(table_name(config.values))
    params_alone = config.values.get("model_type") is None and file.architecture in PARAMS_ARCHITECTURES
    if architecture != file.architecture and not (params_alone and is_mistral_params(config.values)):
        raise config.error(
            "model_type",
            f"is {one_line(repr(config.values.get('model_type')), 60)}, the GGUF's architecture "
            f"{file.architecture}: the file was not made from this checkpoint",
        )
    for difference in other_structure(file, text_section(config)):
        raise YarnEdgeError(difference)
    positions = read_positions(config, overrides)
    parts = positions.parts
    if table_parts(parts) is not None:
        raise YarnEdgeError(
            f"{config.name}: LongRoPE has two tables, and patch writes one set of positions: pass --freeze-at N for the table of contexts "
            "of N tokens (yarn-edge convert writes both into a Phi-3)"
        )
    for text in positions.assumptions:
        note(f"note: {text}")
    for scaling in parts.values():
        if scaling.dim != rotated_dims(file):
            raise YarnEdgeError(
                f"{scaling.source('dim')}: {scaling.dim} dimensions are rotated, in {file.path} {rotated_dims(file)}: "
                "this is another model's checkpoint"
            )
    return parts


def _edits(file: GGUFFile, goal: RopeScaling, plan: RopePlan) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """(keys to set, keys to remove, tensors to set)."""
    keys = {**plan.keys, **canonical_keys(goal, plan.form, plan.sliding)}
    keys[f"{file.architecture}.context_length"] = goal.extended_context
    ours = (f"{file.architecture}.rope.scaling.", CANONICAL)
    stale = [k for k in file.metadata if k.startswith(ours) and k not in keys]
    stale += [k for k in (f"{file.architecture}.rope.scale_linear",) if k in file.metadata]
    stale += foreign_keys(file)
    base = f"{file.architecture}.rope.freq_base_swa"
    stale += [base] if plan.sliding is not None and base in file.metadata and base not in keys else []
    tensors: dict[str, Any] = plan.tensors
    for name in honoured(file.architecture).table_names:
        if name in file.tensors and not tensors:  # a tensor cannot be removed, but factors of 1 do nothing
            tensors = dict.fromkeys(honoured(file.architecture).table_names, np.ones(goal.dim // 2, np.float32))
    return keys, stale, tensors


def _without_type(file: GGUFFile) -> GGUFFile:
    key = f"{file.architecture}.rope.scaling.type"
    return replace(file, metadata={k: v for k, v in file.metadata.items() if k != key})


def patch(
    source: str | Path,
    output: str | Path,
    *,
    checkpoint: str | Path | None = None,
    overrides: ScalingOverrides = NO_OVERRIDES,
    planner: PlannerOptions = EXACT,
    force: bool = False,
    sync: bool = False,
) -> tuple[list[Path], RopePlan, list[str]]:
    """Write `source` to `output` with another scaling. Returns (files, the plan, the changes as sentences).

    The scaling is that of `checkpoint`, or else what the file describes, with `overrides` on top. planner: which forms may be
    written. sync: wait until everything is on the disk; otherwise the system writes it later, as after cp.
    Raises YarnEdgeError if the scaling is unknown or no GGUF can carry it; then nothing is written.
    """
    file = read_gguf(source, vocabulary=False)
    replaces_type = checkpoint is not None or "factor" in overrides.fields
    check_loadable(file if not replaces_type else _without_type(file))
    outputs = output_files(file, Path(output), force)
    if checkpoint is not None:
        parts = from_checkpoint(file, Path(checkpoint), overrides)
    else:
        parts = file_parts(FilePositions(file), overrides)
    plan = plan_parts(parts, file.architecture, planner)
    goal = parts["full_attention"] if len(parts) > 1 else next(iter(parts.values()))
    if plan.message:
        note(plan.message)
    base = file.metadata.get(f"{file.architecture}.rope.freq_base")
    if (
        checkpoint is not None
        and isinstance(base, (int, float))
        and base
        and goal.method != "ntk"
        and abs(base / goal.rope_theta - 1) > SAME_RELATIVE
    ):
        note(f"warning: the base changes from {base:g} to {goal.rope_theta:g}: was the file made from this checkpoint?")
    keys, stale, tensors = _edits(file, goal, plan)
    total = shards_bytes(file)
    check_space(outputs[0].parent, total, "the patched file")
    with partial_files(outputs) as partials:
        with bar("Copying", total, "bytes") as advance:
            changes = edit_gguf_files(
                file, partials, set_keys=keys, remove_keys=stale, set_tensors=tensors, advance=advance, flush=sync
            )
        _check(partials[0], goal, plan)
        publish_files(partials, outputs, force, sync)
    return outputs, plan, changes


def _check(path: Path, goal: RopeScaling, plan: RopePlan) -> None:
    """Read the result back, and check its description and what llama.cpp runs of it."""
    written = read_gguf(path, vocabulary=False)
    check_loadable(written)
    positions = FilePositions(written)
    same = positions.canonical == goal and positions.canonical_sliding == plan.sliding
    sliding = positions.effective_sliding(positions.explicit_arguments) if plan.sliding is not None else None
    if sliding is not None and plan.sliding is not None:
        same &= not angle_error(sliding, plan.sliding).any_difference
    if not same or angle_error(positions.runs, plan.runs).any_difference:
        raise YarnEdgeError(f"{path}: the patched file would not run the requested scaling")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge patch`."""
    parser.add_argument("model", metavar="IN.gguf", help="a GGUF (of a split one, the first file)")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.gguf", help="the new file; IN.gguf is never changed"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--from", dest="checkpoint", metavar="CHECKPOINT", help="use the scaling in this checkpoint folder's config"
    )
    where.add_argument("--repair", action="store_true", help="make the file run what it describes")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    parser.add_argument("--sync", action="store_true", help="wait until the new file is on the disk (cp does not)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_planner_flags(parser)
    add_scaling_flags(parser, "what the file should run, on top of its own description or of CHECKPOINT")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge patch`: prints what changed."""
    overrides = scaling_overrides(args)
    if not (args.repair or args.checkpoint or overrides.fields):
        raise YarnEdgeError("nothing to do: pass --repair, --from CHECKPOINT, or --yarn-… flags")
    if overrides.for_checkpoints and not args.checkpoint:
        raise YarnEdgeError(f"{overrides.for_checkpoints[0]} needs --from CHECKPOINT: a GGUF is static")
    outputs, plan, changes = patch(
        args.model,
        args.output,
        checkpoint=args.checkpoint,
        overrides=overrides,
        planner=planner_options(args),
        force=args.force,
        sync=args.sync,
    )
    if args.json:
        write_json({"model": args.model, "output": outputs, "form": plan.form, "changes": changes})
    else:
        write_text("".join(f"{one_line(change, 2000)}\n" for change in changes or ["no key had to change"]))
    for path in outputs:
        note(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    against = f" --against {args.checkpoint}" if args.checkpoint else ""
    note(f"to prove it: yarn-edge verify {outputs[0]}{against}")
    return 0
