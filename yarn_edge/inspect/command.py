"""`yarn-edge inspect`: what a GGUF or a checkpoint declares about positions, and what the runtime will really apply.

It reads headers only, no weights. Findings are sentences for people. `runtime_arguments` are what a plain
`llama_cpp.Llama(path, **arguments)` needs to run the file's own scaling.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.quantized import quantization_notes
from yarn_edge.checkpoint.read import read_positions, read_scaling, table_parts
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import FLAGS, NO_OVERRIDES, Reading, ScalingOverrides, add_scaling_flags, scaling_overrides
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.findings import Finding, examine
from yarn_edge.inspect.outcome import CarriedForm, CheckpointOutcome, GGUFOutcome
from yarn_edge.inspect.patient import Patient
from yarn_edge.inspect.plot import plot_scaling
from yarn_edge.inspect.trained import base_findings, training_findings, with_base
from yarn_edge.llama_rules.description import CANONICAL, is_described
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.frequency_tables import judged_contexts
from yarn_edge.llama_rules.honoured import CHECKPOINT_ARCHITECTURES, GGUF_ARCHITECTURES, SHORT_FACTORS, table_name
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.planner import plain_llama_cpp, plan_parts, plan_tables
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.kv_cache import has_plain_cache, kv_bytes
from yarn_edge.stdout import write_json, write_text

CALIBRATION = "yarn_edge.calibration."
CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
KV_SHOWN = ("f16", "q8_0", "q4_0")


def inspect_gguf(positions: FilePositions) -> GGUFOutcome:
    """What a GGUF declares and what would run of it. Raises YarnEdgeError if llama.cpp could not load it."""
    file = positions.file
    check_loadable(file)
    sizes = judged_contexts(file)
    if len(sizes) > 1:
        note(f"LongRoPE: what follows is for contexts of more than {sizes[0]} tokens; shorter ones run {SHORT_FACTORS}")
    patient = Patient.of(positions.at(sizes[-1]))
    refused = [Finding("cannot be judged", why, "the message", "correct what it names") for why in patient.refusals]
    longest = int(file.number("context_length") or 0)
    contexts = sorted({c for c in CONTEXTS if c < longest} | {longest})
    knows_cache = file.tensors and has_plain_cache(file)
    return GGUFOutcome(
        path=file.path,
        architecture=file.architecture,
        name=_bounded(file.metadata.get("general.name")),
        n_files=len(file.shards),
        n_tensors=len(file.tensors),
        weight_bytes=file.weight_bytes,
        tensor_types=_count_types(file),
        declared=patient.declared,
        wanted=patient.wanted,
        effective=patient.effective,
        canonical=is_described(file),
        form=_bounded(file.metadata.get(CANONICAL + "form")),
        runtime_arguments=patient.arguments,
        findings=[*refused, *examine(patient)],
        kv_bytes={c: {t: kv_bytes(file, c, t) for t in KV_SHOWN} for c in contexts} if knows_cache else {},
        calibration=_calibration(file),
    )


def inspect_checkpoint(
    folder: Path, overrides: ScalingOverrides = NO_OVERRIDES, base: Path | None = None
) -> CheckpointOutcome:
    """What a checkpoint's config says: its dialect, its scaling by part, and how a GGUF could carry it.

    base: the folder of the model that it was trained from. Raises YarnEdgeError if the config cannot be read at all.
    """
    config = read_config(folder)
    positions = read_positions(config, overrides) if base is None else with_base(folder, base, overrides)
    names, model_type = config.values.get("architectures"), table_name(config.values)
    findings = [*training_findings(folder, positions.parts)]
    if base is not None:
        findings += base_findings(folder, base, positions.parts)
    if model_type not in GGUF_ARCHITECTURES:
        findings.append(
            Finding(
                "unknown family",
                "convert does not know this model family",
                f"model_type {model_type!r}",
                "give a GGUF made by llama.cpp's converter these positions: yarn-edge patch MODEL.gguf -o FIXED.gguf "
                "--from CHECKPOINT",
            )
        )
    architecture = CHECKPOINT_ARCHITECTURES.get(model_type)
    plans: dict[str, CarriedForm] = {}
    if architecture is not None:
        try:
            tables = table_parts(positions.parts)
            both = plan_tables(*tables, architecture) if tables else None
            plan = both or plan_parts(positions.parts, architecture)
        except YarnEdgeError as refusal:
            remedy = "--allow-approximate-rope writes the nearest scaling that a GGUF can carry, which is wrong"
            if any(not scaling.is_static for scaling in positions.parts.values()):
                remedy = "--freeze-at N, the length in tokens whose angles are used"
            layers = ", ".join(positions.parts) or "all layers"
            findings.append(Finding("cannot be carried", str(refusal), layers, remedy))
        else:
            part = "" if len(positions.parts) == 1 or plan.short else "full_attention"
            plans[part] = CarriedForm(architecture, plan.form, plan.keys, plan.message)
    shown = names[0] if isinstance(names, list) and names else model_type
    notes = (*positions.notes, *positions.assumptions, *quantization_notes(config))
    return CheckpointOutcome(folder, shown, positions.dialect, positions.parts, plans, notes, findings)


def inspect_model(
    path: str | Path, freeze_at: int | None = None, attention_factor_reading: Reading | None = None
) -> dict[str, Any]:
    """The report on a GGUF or a checkpoint folder, as `yarn-edge inspect --json` prints it (docs/inspect.md has its keys).

    freeze_at: for dynamic scaling in a checkpoint, the length in tokens whose angles are taken. attention_factor_reading: of an
    attn_factor in a checkpoint. Raises YarnEdgeError for what cannot be read at all.
    """
    path = Path(path)
    overrides = ScalingOverrides(freeze_at=freeze_at, attention_factor_reading=attention_factor_reading)
    positions = _positions(path, overrides)
    outcome = inspect_checkpoint(path, overrides) if positions is None else inspect_gguf(positions)
    return outcome.as_json()


def _positions(path: Path, overrides: ScalingOverrides) -> FilePositions | None:
    """Of a GGUF; None for a checkpoint folder, the only one that `overrides` are for."""
    if path.is_dir():
        return None
    if overrides.for_checkpoints:
        raise YarnEdgeError(f"{overrides.for_checkpoints[0]} is for checkpoints; a GGUF is static")
    if overrides:
        given = ", ".join(FLAGS[name] for name in overrides.fields)
        raise YarnEdgeError(f"{given}: for checkpoints here; give them to yarn-edge patch for a GGUF")
    return FilePositions(read_gguf(path))


def _bounded(value: Any) -> Any:
    """A key's value; of an array of numbers the first 32."""
    return value[:32] if isinstance(value, np.ndarray) else value


def _calibration(file: GGUFFile) -> dict[str, Any]:
    """What `convert --calibrate` wrote; values that are no text and no numbers are left out."""
    told = {key.removeprefix(CALIBRATION): v for key, v in file.metadata.items() if key.startswith(CALIBRATION)}
    return {key: value for key, value in told.items() if isinstance(value, (str, int, float))}


def _count_types(file: GGUFFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type_name] = counts.get(tensor.type_name, 0) + 1
    return counts


def _checkpoint_sides(folder: Path, overrides: ScalingOverrides) -> tuple[RopeScaling, RopeScaling | None]:
    """(what a checkpoint wants, what plain llama.cpp would run of it; None if that is unknown)."""
    config = read_config(folder)
    wanted = read_scaling(config, overrides)
    if not wanted.is_static:
        raise YarnEdgeError(f"{folder}: {wanted.method} has no fixed frequencies to draw: pass --freeze-at N")
    architecture = CHECKPOINT_ARCHITECTURES.get(table_name(config.values))
    return wanted, plain_llama_cpp(wanted, architecture) if architecture else None


def _plot(target: Path, name: str, wanted: RopeScaling, runs: RopeScaling | None) -> None:
    n_wrong = plot_scaling(target, name, wanted, runs)
    if runs is None or n_wrong is None:
        note(f"{target}: it is not known what plain llama.cpp would run of this")
        return
    attention = abs(runs.attention_factor / wanted.attention_factor - 1)
    also = f", and the attention factor would be {attention:.2%} off" if attention > SAME_RELATIVE else ""
    note(f"{target}: {n_wrong} of {wanted.dim // 2} pairs would be wrong in plain llama.cpp{also}")


def _check_picture(target: Path, source: Path, force: bool) -> None:
    """Refuse to overwrite an existing file without `force`, and the model in any case."""
    if not target.name:
        raise YarnEdgeError("--plot is empty: give it the name of a file")
    if target.is_symlink() or target.exists():
        if not target.is_file() or target.is_symlink() or (source.is_file() and target.samefile(source)):
            raise YarnEdgeError(f"{target}: is not a picture that may be overwritten: give the name of a new file")
        if not force:
            raise YarnEdgeError(f"{target}: exists already; --force overwrites it")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge inspect`."""
    parser.add_argument("model", metavar="MODEL", help="a GGUF, or a checkpoint folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw the wavelength of each pair before and after scaling, and the pairs that plain llama.cpp gets wrong",
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing picture")
    parser.add_argument(
        "--against-base",
        type=Path,
        metavar="BASE",
        help="for a checkpoint: the folder of the model that it was trained from, to find a lost base of the rotation, and a scaling that "
        "nothing was trained with",
    )
    add_scaling_flags(parser, "for a checkpoint, as convert takes them")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge inspect`."""
    path = Path(args.model)
    overrides = scaling_overrides(args)
    positions = _positions(path, overrides)
    if positions is not None and args.against_base is not None:
        raise YarnEdgeError("--against-base is for a checkpoint folder")
    outcome = inspect_checkpoint(path, overrides, args.against_base) if positions is None else inspect_gguf(positions)
    if args.plot is not None:
        _check_picture(Path(args.plot), path, args.force)
        sides = (positions.wanted, positions.effective()) if positions else _checkpoint_sides(path, overrides)
        _plot(Path(args.plot), path.name, *sides)
    if args.json:
        write_json(outcome.as_json())
    else:
        write_text(outcome.text())
    return 0
