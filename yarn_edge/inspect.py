"""`yarn-edge inspect`: what a GGUF or a checkpoint declares about positions, and what the runtime will really apply.

Only headers are read, no weights. Findings are sentences for people; `runtime_arguments` are what a plain
`llama_cpp.Llama(path, **arguments)` needs to run the file's own scaling.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge import metadata
from yarn_edge.config_file import read_config
from yarn_edge.config_scaling import read_scaling
from yarn_edge.dialects import recognise
from yarn_edge.effective import effective
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf_file import GGUFFile, read_gguf
from yarn_edge.honoured import GGUF_ARCHITECTURES
from yarn_edge.loadable import check_loadable
from yarn_edge.memory import PLAIN_CACHE, kv_bytes
from yarn_edge.scaling import RopeScaling

CONTEXTS = (4096, 8192, 16384, 32768, 65536, 131072)
KV_SHOWN = ("f16", "q8_0", "q4_0")
_SHOWN = (
    "method", "factor", "original_context", "extended_context", "attention_factor", "ext_factor", "beta_fast",
    "beta_slow", "truncate", "ramp", "rope_theta", "dim",
)  # fmt: skip


def _try(function: Any, *arguments: Any) -> tuple[Any, str]:
    """(result, "") or (None, why it was refused)."""
    try:
        return function(*arguments), ""
    except YarnEdgeError as error:
        return None, str(error)


def _findings(file: GGUFFile, sides: dict[str, RopeScaling | None], arguments: dict[str, Any] | None) -> list[str]:
    said, runs, goal = sides["declared"], sides["effective"], sides["wanted"]
    if said is None or runs is None or goal is None:
        return []
    found = []
    arch = file.architecture
    for field, (want, have) in sorted(goal.differences(said).items()):
        found.append(f"{field}: the keys say {have!r}, the file's own description is {want!r}")
    for field, (want, have) in sorted(goal.differences(runs).items()):
        if field != "method":
            found.append(f"{field}: llama.cpp runs {have!r}, the file's own description is {want!r}")
    if arguments:
        found.append(
            "llama.cpp needs runtime arguments to run this file's own scaling; yarn-edge passes them by itself"
        )
    if arguments is None:
        found.append("no runtime arguments make llama.cpp run this file's own scaling")
    context = file.number("context_length")
    if said.method != "none" and context is not None and context < said.extended_context:
        found.append(
            f"context capped: {arch}.context_length is {context:g}, the scaling reaches {said.extended_context}; "
            "front ends will stop at the former"
        )
    if said.method == "yarn" and f"{arch}.rope.scaling.original_context_length" not in file.metadata:
        found.append(
            f"{arch}.rope.scaling.original_context_length is missing: llama.cpp takes context_length in its place"
        )
    return found


def inspect_gguf(path: Path) -> dict[str, Any]:
    """The report on a GGUF as a JSON-able dict (see docs/inspect.md for its keys)."""
    file = read_gguf(path)
    check_loadable(file)
    sides: dict[str, RopeScaling | None] = {}
    reasons: list[str] = []
    for name, function in (
        ("declared", metadata.declared),
        ("wanted", metadata.wanted),
        ("effective", effective),
    ):
        sides[name], reason = _try(function, file)
        if reason and reason not in reasons:
            reasons.append(reason)
    arguments = metadata.llama_class_arguments(file) if not reasons else None
    longest = int(file.number("context_length") or 0)
    contexts = sorted({c for c in CONTEXTS if c < longest} | {longest})
    return {
        "model": str(path),
        "kind": "gguf",
        "architecture": file.architecture,
        "name": file.metadata.get("general.name"),
        "n_tensors": len(file.tensors),
        "weight_bytes": file.weight_bytes,
        "tensor_types": _count_types(file),
        "declared": _as_json(sides["declared"]),
        "wanted": _as_json(sides["wanted"]),
        "effective": _as_json(sides["effective"]),
        "canonical": metadata.CANONICAL + "version" in file.metadata,
        "runtime_arguments": arguments,
        "findings": [*reasons, *(_findings(file, sides, arguments) if not reasons else [])],
        "kv_bytes": {str(c): {t: kv_bytes(file, c, t) for t in KV_SHOWN} for c in contexts}
        if file.tensors and file.architecture in PLAIN_CACHE
        else {},
    }


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """The report on a checkpoint's config: its dialect, its scaling, and whether a GGUF can carry it.

    Raises YarnEdgeError where the config cannot be read at all.
    """
    config = read_config(folder)
    scaling = read_scaling(config)
    names = config.values.get("architectures")
    family = GGUF_ARCHITECTURES.get(str(config.values.get("model_type")))
    findings = [] if family else [f"model_type {config.values.get('model_type')!r}: convert does not know this family"]
    if family:
        _keys, refusal = _try(metadata.gguf_keys, scaling, family)
        findings += [refusal] if refusal else []
    return {
        "model": str(folder),
        "kind": "checkpoint",
        "architecture": names[0] if isinstance(names, list) and names else config.values.get("model_type"),
        "dialect": recognise(config).name,
        "declared": _as_json(scaling),
        "findings": findings,
    }


def _count_types(file: GGUFFile) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tensor in file.tensors.values():
        counts[tensor.type_name] = counts.get(tensor.type_name, 0) + 1
    return counts


def _as_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    return None if scaling is None else scaling.as_dict() | {"extended_context": scaling.extended_context}


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else one_line(str(value), 40)


def _print(report: dict[str, Any]) -> None:
    out = sys.stdout.write
    out(f"{report['model']}: {one_line(str(report['architecture']), 80)} {report.get('dialect', 'GGUF')}\n")
    if report["kind"] == "gguf":
        types = ", ".join(f"{n} {name}" for name, n in sorted(report["tensor_types"].items(), key=lambda i: -i[1]))
        out(f"{report['n_tensors']} tensors ({types}), {report['weight_bytes'] / 1e6:.1f} MB of weights\n")
    sides = [s for s in ("declared", "effective", "wanted") if report.get(s)]
    if sides:
        out(f"\n{'':<18}" + "".join(f"{s:<16}" for s in sides) + "source\n")
        for field in _SHOWN:
            row = "".join(f"{_number(report[s][field]):<16}" for s in sides)
            out(f"{field:<18}{row}{report[sides[0]]['provenance'].get(field, '')}\n")
    for context, sizes in report.get("kv_bytes", {}).items():
        if context == next(iter(report["kv_bytes"])):
            out("\nKV cache" + " " * 10 + "".join(f"{t:<16}" for t in sizes) + "\n")
        out(f"{context + ' tokens':<18}" + "".join(f"{b / 2**20:<16.0f}" for b in sizes.values()) + "MiB\n")
    if report.get("runtime_arguments"):
        told = ", ".join(f"{k}={v!r}" for k, v in report["runtime_arguments"].items())
        out(f"\nllama_cpp.Llama(path, {told})\n")
    out("\n" + "\n".join(f"! {f}" for f in report["findings"]) + ("\n" if report["findings"] else "no findings\n"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge inspect`."""
    parser.add_argument("model", metavar="MODEL", help="a GGUF, or a checkpoint folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge inspect`."""
    path = Path(args.model)
    report = inspect_checkpoint(path) if path.is_dir() else inspect_gguf(path)
    if args.json:
        sys.stdout.write(json.dumps(_finite(report), ensure_ascii=False) + "\n")
    else:
        _print(report)
    return 0


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity, and NumPy scalars are not JSON: plain values, null for what is not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
