"""What `inspect` found out about a model, as typed values, each with its JSON (docs/inspect.md has the keys) and its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import one_line
from yarn_edge.inspect.findings import Finding
from yarn_edge.positions.scaling import RopeScaling

_SHOWN = (
    "method", "factor", "original_context", "extended_context", "attention_factor", "ext_factor", "beta_fast",
    "beta_slow", "truncate", "ramp", "rope_theta", "dim", "frequency_factors", "softmax_factor",
)  # fmt: skip


@dataclass(frozen=True)
class GGUFOutcome:
    """A GGUF. declared, wanted, effective: the readings of its positions, None if refused; canonical: it carries its own description.

    runtime_arguments: what a plain `llama_cpp.Llama(path, **arguments)` needs to run it as wanted, None if none help.
    kv_bytes: bytes of the cache by context in tokens and cache type; empty if the architecture's cache is not of the plain form.
    calibration: what the file says of it, by key; empty if it was made without.
    """

    path: Path
    architecture: str
    name: Any
    n_files: int
    n_tensors: int
    weight_bytes: int
    tensor_types: Mapping[str, int]
    declared: RopeScaling | None
    wanted: RopeScaling | None
    effective: RopeScaling | None
    canonical: bool
    form: Any
    runtime_arguments: Mapping[str, Any] | None
    findings: Sequence[Finding]
    kv_bytes: Mapping[int, Mapping[str, int | None]]
    calibration: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        return {
            "model": str(self.path),
            "kind": "gguf",
            "architecture": self.architecture,
            "name": self.name,
            "n_files": self.n_files,
            "n_tensors": self.n_tensors,
            "weight_bytes": self.weight_bytes,
            "tensor_types": self.tensor_types,
            "calibration": self.calibration,
            "declared": _scaling_json(self.declared),
            "wanted": _scaling_json(self.wanted),
            "effective": _scaling_json(self.effective),
            "canonical": self.canonical,
            "form": self.form,
            "runtime_arguments": self.runtime_arguments,
            "findings": [asdict(finding) for finding in self.findings],
            "kv_bytes": {str(n_ctx): sizes for n_ctx, sizes in self.kv_bytes.items()},
        }

    def text(self) -> str:
        """What is printed without --json."""
        types = ", ".join(f"{n} {name}" for name, n in sorted(self.tensor_types.items(), key=lambda item: -item[1]))
        files = f" in {self.n_files} files" if self.n_files > 1 else ""
        readings = {"declared": self.declared, "effective": self.effective, "wanted": self.wanted}
        parts = [
            _heading(self.path, self.architecture, "GGUF"),
            f"{self.n_tensors} tensors ({types}), {self.weight_bytes / 1e6:.1f} MB of weights{files}\n",
            *self._calibration_lines(),
            _scaling_table({title: scaling for title, scaling in readings.items() if scaling is not None}),
            *self._cache_lines(),
        ]
        if self.runtime_arguments:
            arguments = ", ".join(f"{key}={value!r}" for key, value in self.runtime_arguments.items())
            parts.append(f"\nllama_cpp.Llama(path, {arguments})\n")
        return "".join([*parts, _findings_text(self.findings)])

    def _calibration_lines(self) -> list[str]:
        told = [
            f"{one_line(key, 40)} {one_line(value, 200) if isinstance(value, str) else _number(value)}"
            for key, value in self.calibration.items()
        ]
        return [f"calibration: {'; '.join(told)}\n"] if told else []

    def _cache_lines(self) -> list[str]:
        lines: list[str] = []
        for n_ctx, sizes in self.kv_bytes.items():
            if not lines:
                lines.append("\nKV cache" + " " * 10 + "".join(f"{kv_type:<16}" for kv_type in sizes) + "\n")
            cells = "".join(f"{(n_bytes or 0) / 2**20:<16.0f}" for n_bytes in sizes.values())
            lines.append(f"{f'{n_ctx} tokens':<18}{cells}MiB\n")
        return lines


@dataclass(frozen=True)
class CarriedForm:
    """How a GGUF of `architecture` can carry a checkpoint's scaling: the planner's form, the keys, and what that means for users."""

    architecture: str
    form: str
    keys: Mapping[str, Any]
    message: str


@dataclass(frozen=True)
class CheckpointOutcome:
    """A checkpoint's config. parts: the scaling by layer type ("" if it is one); plans: how a GGUF could carry it, by part."""

    path: Path
    architecture: Any
    dialect: str
    parts: Mapping[str, RopeScaling]
    plans: Mapping[str, CarriedForm]
    notes: Sequence[str]
    findings: Sequence[Finding]

    def as_json(self) -> dict[str, Any]:
        """The object of --json."""
        parts = {part: _scaling_json(scaling) for part, scaling in self.parts.items()}
        return {
            "model": str(self.path),
            "kind": "checkpoint",
            "architecture": self.architecture,
            "dialect": self.dialect,
            "declared": next(iter(parts.values())) if len(parts) == 1 else None,
            "parts": parts,
            "plans": {part: asdict(plan) for part, plan in self.plans.items()},
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def text(self) -> str:
        """What is printed without --json."""
        plans = [
            f"\nplan for {plan.architecture}{f' ({part})' if part else ''}: {plan.form}\n"
            + (f"{plan.message}\n" if plan.message else "")
            for part, plan in self.plans.items()
        ]
        table = _scaling_table({part or "declared": scaling for part, scaling in self.parts.items()})
        notes = [f"\nnote: {one_line(sentence, 2000)}\n" for sentence in self.notes]
        heading = _heading(self.path, self.architecture, self.dialect)
        return "".join([heading, table, *plans, *notes, _findings_text(self.findings)])


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    return None if scaling is None else scaling.as_dict() | {"extended_context": scaling.extended_context}


def _heading(path: Path, architecture: Any, kind: str) -> str:
    return f"{one_line(str(path), 400)}: {one_line(str(architecture), 80)} {kind}\n"


def _scaling_table(columns: Mapping[str, RopeScaling]) -> str:
    """A line for each field that any of the scalings sets, and where the first one has it from."""
    if not columns:
        return ""
    width = max(16, *(len(title) + 2 for title in columns))
    lines = [f"\n{'':<18}" + "".join(f"{title:<{width}}" for title in columns) + "source\n"]
    first = next(iter(columns.values()))
    fields = [scaling.as_dict() | {"extended_context": scaling.extended_context} for scaling in columns.values()]
    for field in _SHOWN:
        values = [of_one.get(field) for of_one in fields]
        if any(value is not None for value in values):
            row = "".join(f"{_number(value):<{width}}" for value in values)
            lines.append(f"{field:<18}{row}{one_line(str(first.provenance.get(field, '')), 2000)}\n")
    return "".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{min(value):.4g} .. {max(value):.4g}"
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else one_line(str(value), 40)


def _findings_text(findings: Sequence[Finding]) -> str:
    lines = ["\n" if findings else "\nno findings\n"]
    for finding in findings:
        what, evidence, remedy = (one_line(text, 2000) for text in (finding.what, finding.evidence, finding.remedy))
        lines.append(f"! {finding.name}: {what}\n    evidence: {evidence}\n    remedy:   {remedy}\n")
    return "".join(lines)
