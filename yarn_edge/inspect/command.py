"""`yarn-edge inspect`: what a GGUF or a checkpoint declares about positions, and what the runtime will really apply.

It reads headers only, no weights. Findings are sentences for people. `runtime_arguments` are what a plain
`llama_cpp.Llama(path, **arguments)` needs to run the file's own scaling.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import ScalingOverrides, add_freeze_flag
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.findings import Finding, examine
from yarn_edge.inspect.patient import Patient
from yarn_edge.inspect.plot import plot_scaling
from yarn_edge.llama_rules.description import CANONICAL, is_described
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import CHECKPOINT_ARCHITECTURES, GGUF_ARCHITECTURES
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.planner import plain_llama_cpp, plan_parts
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.progress import note
from yarn_edge.runtime.kv_cache import has_plain_cache, kv_bytes
from yarn_edge.stdout import write_json, write_text

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
KV_SHOWN = ("f16", "q8_0", "q4_0")
_SHOWN = (
    "method", "factor", "original_context", "extended_context", "attention_factor", "ext_factor", "beta_fast",
    "beta_slow", "truncate", "ramp", "rope_theta", "dim", "frequency_factors", "softmax_factor",
)  # fmt: skip


def inspect_gguf(positions: FilePositions) -> dict[str, Any]:
    """The report on a GGUF as a JSON-able dict (see docs/inspect.md for its keys)."""
    file = positions.file
    check_loadable(file)
    patient = Patient.of(positions)
    refused = [Finding("cannot be judged", why, "the message", "correct what it names") for why in patient.refusals]
    longest = int(file.number("context_length") or 0)
    contexts = sorted({c for c in CONTEXTS if c < longest} | {longest})
    knows_cache = file.tensors and has_plain_cache(file)
    return {
        "model": str(file.path),
        "kind": "gguf",
        "architecture": file.architecture,
        "name": _bounded(file.metadata.get("general.name")),
        "n_files": len(file.shards),
        "n_tensors": len(file.tensors),
        "weight_bytes": file.weight_bytes,
        "tensor_types": _count_types(file),
        "declared": _as_json(patient.declared),
        "wanted": _as_json(patient.wanted),
        "effective": _as_json(patient.effective),
        "canonical": is_described(file),
        "form": _bounded(file.metadata.get(CANONICAL + "form")),
        "runtime_arguments": patient.arguments,
        "findings": [asdict(f) for f in (*refused, *examine(patient))],
        "kv_bytes": {str(c): {t: kv_bytes(file, c, t) for t in KV_SHOWN} for c in contexts} if knows_cache else {},
    }


def inspect_checkpoint(folder: Path, freeze_at: int | None = None) -> dict[str, Any]:
    """The report on a checkpoint's config: its dialect, its scaling by part, and how a GGUF could carry it.

    Raises YarnEdgeError if the config cannot be read at all.
    """
    config = read_config(folder)
    positions = read_positions(config, ScalingOverrides(freeze_at=freeze_at))
    names, model_type = config.values.get("architectures"), str(config.values.get("model_type"))
    findings: list[Finding] = []
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
    plans = {}
    if architecture is not None:
        try:
            plan = plan_parts(positions.parts, architecture)
        except YarnEdgeError as refusal:
            remedy = "--allow-approximate-rope writes the nearest scaling that a GGUF can carry, which is wrong"
            if any(not scaling.is_static for scaling in positions.parts.values()):
                remedy = "--freeze-at N, the length in tokens whose angles are used"
            layers = ", ".join(positions.parts) or "all layers"
            findings.append(Finding("cannot be carried", str(refusal), layers, remedy))
        else:
            plans["" if len(positions.parts) == 1 else "full_attention"] = {
                "architecture": architecture,
                "form": plan.form,
                "keys": plan.keys,
            }
    parts = {part: _as_json(scaling) for part, scaling in positions.parts.items()}
    return {
        "model": str(folder),
        "kind": "checkpoint",
        "architecture": names[0] if isinstance(names, list) and names else model_type,
        "dialect": positions.dialect,
        "declared": next(iter(parts.values())) if len(parts) == 1 else None,
        "parts": parts,
        "plans": plans,
        "notes": list(positions.notes),
        "findings": [asdict(f) for f in findings],
    }


def inspect_model(path: str | Path, freeze_at: int | None = None) -> dict[str, Any]:
    """The report on a GGUF or a checkpoint folder, as `yarn-edge inspect --json` prints it (docs/inspect.md has its keys).

    freeze_at: for dynamic scaling in a checkpoint, the length in tokens whose angles are taken. Raises YarnEdgeError for what
    cannot be read at all.
    """
    path = Path(path)
    positions = _positions(path, freeze_at)
    return inspect_checkpoint(path, freeze_at) if positions is None else inspect_gguf(positions)


def _positions(path: Path, freeze_at: int | None) -> FilePositions | None:
    """Of a GGUF; None for a checkpoint folder, the only one that `freeze_at` is for."""
    if path.is_dir():
        return None
    if freeze_at is not None:
        raise YarnEdgeError("--freeze-at is for checkpoints; a GGUF is static")
    return FilePositions(read_gguf(path))


def _bounded(value: Any) -> Any:
    """A key's value; of an array of numbers the first 32."""
    return value[:32] if isinstance(value, np.ndarray) else value


def _count_types(file: GGUFFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type_name] = counts.get(tensor.type_name, 0) + 1
    return counts


def _as_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    return None if scaling is None else scaling.as_dict() | {"extended_context": scaling.extended_context}


def _number(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{min(value):.4g} .. {max(value):.4g}"
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else one_line(str(value), 40)


def _columns(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Column title -> scaling as JSON: the three readings of a GGUF, or the parts of a checkpoint."""
    if report["kind"] == "checkpoint":
        return {part or "declared": scaling for part, scaling in report["parts"].items()}
    return {side: report[side] for side in ("declared", "effective", "wanted") if report[side]}


def _print(report: dict[str, Any]) -> None:
    out = write_text
    out(
        f"{one_line(report['model'], 400)}: {one_line(str(report['architecture']), 80)} {report.get('dialect', 'GGUF')}\n"
    )
    if report["kind"] == "gguf":
        types = ", ".join(f"{n} {name}" for name, n in sorted(report["tensor_types"].items(), key=lambda i: -i[1]))
        files = f" in {report['n_files']} files" if report["n_files"] > 1 else ""
        out(f"{report['n_tensors']} tensors ({types}), {report['weight_bytes'] / 1e6:.1f} MB of weights{files}\n")
    columns = _columns(report)
    if columns:
        width = max(16, *(len(title) + 2 for title in columns))
        out(f"\n{'':<18}" + "".join(f"{title:<{width}}" for title in columns) + "source\n")
        first = next(iter(columns.values()))
        for field in _SHOWN:
            if all(column.get(field) is None for column in columns.values()):
                continue
            row = "".join(f"{_number(column.get(field)):<{width}}" for column in columns.values())
            out(f"{field:<18}{row}{first['provenance'].get(field, '')}\n")
    for part, plan in report.get("plans", {}).items():
        out(f"\nplan for {plan['architecture']}{f' ({part})' if part else ''}: {plan['form']}\n")
    for sentence in report.get("notes", []):
        out(f"\nnote: {sentence}\n")
    for context, sizes in report.get("kv_bytes", {}).items():
        if context == next(iter(report["kv_bytes"])):
            out("\nKV cache" + " " * 10 + "".join(f"{t:<16}" for t in sizes) + "\n")
        out(f"{context + ' tokens':<18}" + "".join(f"{b / 2**20:<16.0f}" for b in sizes.values()) + "MiB\n")
    if report.get("runtime_arguments"):
        arguments = ", ".join(f"{k}={v!r}" for k, v in report["runtime_arguments"].items())
        out(f"\nllama_cpp.Llama(path, {arguments})\n")
    out("\n" if report["findings"] else "\nno findings\n")
    for f in report["findings"]:
        out(f"! {f['name']}: {f['what']}\n    evidence: {f['evidence']}\n    remedy:   {f['remedy']}\n")


def _checkpoint_sides(folder: Path, freeze_at: int | None) -> tuple[RopeScaling, RopeScaling | None]:
    """(what a checkpoint wants, what plain llama.cpp would run of it; None if that is unknown)."""
    config = read_config(folder)
    wanted = read_scaling(config, ScalingOverrides(freeze_at=freeze_at))
    if not wanted.is_static:
        raise YarnEdgeError(f"{folder}: {wanted.method} has no fixed frequencies to draw: pass --freeze-at N")
    architecture = CHECKPOINT_ARCHITECTURES.get(str(config.values.get("model_type")))
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
    add_freeze_flag(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge inspect`."""
    path = Path(args.model)
    positions = _positions(path, args.freeze_at)
    report = inspect_checkpoint(path, args.freeze_at) if positions is None else inspect_gguf(positions)
    if args.plot is not None:
        _check_picture(Path(args.plot), path, args.force)
        sides = (positions.wanted, positions.effective()) if positions else _checkpoint_sides(path, args.freeze_at)
        _plot(Path(args.plot), path.name, *sides)
    if args.json:
        write_json(report)
    else:
        _print(report)
    return 0
