"""A GGUF under examination: its header and positions as far as they can be read, and the commands that would mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.declared import open_attention_factor
from yarn_edge.llama_rules.description import is_described
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

PATCH = "yarn-edge patch MODEL.gguf -o FIXED.gguf"


@dataclass(frozen=True)
class Finding:
    """One illness: its name, what it is, the evidence in the file, and what to do."""

    name: str
    what: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}. Evidence: {self.evidence}. Remedy: {self.remedy}"


@dataclass(frozen=True)
class Patient:
    """A file and its readings; None where a reading was refused. refusals: why.

    arguments: what a plain `llama_cpp.Llama` needs, None where nothing helps or a reading was refused.
    """

    file: GGUFFile
    declared: RopeScaling | None
    effective: RopeScaling | None
    wanted: RopeScaling | None
    arguments: dict[str, Any] | None
    refusals: tuple[str, ...] = ()

    @classmethod
    def of(cls, positions: FilePositions) -> Patient:
        """The readings of a file."""
        refusals: list[str] = []

        def read(reading: Callable[[], RopeScaling]) -> RopeScaling | None:
            try:
                return reading()
            except YarnEdgeError as refusal:
                refusals.append(str(refusal))
                return None

        declared, wanted = read(lambda: positions.declared), read(lambda: positions.wanted)
        effective = read(positions.effective)
        arguments = None if refusals else positions.llama_class_arguments
        return cls(positions.file, declared, effective, wanted, arguments, tuple(dict.fromkeys(refusals)))

    def key(self, name: str) -> str:
        return f"{self.file.architecture}.rope.scaling.{name}"

    def raw(self, name: str) -> Any:
        """A key's value as it stands, None where absent."""
        return self.file.metadata.get(self.key(name))

    def number(self, name: str) -> float | None:
        value = self.raw(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def is_ours(self) -> bool:
        """Whether the file carries its own description, which leaves nothing open."""
        return is_described(self.file)

    @property
    def unclear_factor(self) -> float | None:
        """A yarn_attn_factor whose meaning is open: written for A itself, and for what multiplies it."""
        return open_attention_factor(self.file)

    def patch(self, *flags: str) -> str:
        """The patch command with `flags`, and with one for what the file leaves open besides."""
        told = list(flags)
        if self.is_yarn and not self.is_ours and self.raw("original_context_length") is None:
            told.append("--yarn-orig-ctx N")
        if self.unclear_factor is not None and not any("--yarn-attention-factor" in flag for flag in flags):
            told.append("--yarn-attention-factor A")
        return f"{PATCH} {' '.join(told or ['--repair'])}"

    @property
    def repair(self) -> str:
        """What makes the file run what it says; where no file can, the arguments."""
        if self.unclear_factor is not None:
            own, factor = self.unclear_factor, yarn_attention_factor(self.number("factor") or 1.0)
            return (
                f"{self.patch()}, where A is {own:.10g} if the checkpoint's config has it as attention_factor (A itself), "
                f"{own * factor:.10g} if it is attn_factor of the Nous code (a multiplier)"
            )
        if self.wanted is None:
            return f"{self.patch()}, which says what can be carried"
        try:
            form = plan_rope(self.wanted, self.file.architecture).form
        except YarnEdgeError:
            return (
                f"no GGUF of architecture {self.file.architecture} carries this, nor do arguments: run it elsewhere, or live "
                "with these numbers"
            )
        if form != "arguments":
            return f"{self.patch()} (exact in every llama.cpp program)"
        if not self.arguments:
            return f"{self.patch()}; the file then needs runtime arguments, which yarn-edge passes by itself"
        told = ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
        return (
            f"yarn-edge passes it by itself; elsewhere llama_cpp.Llama(path, {told}): no GGUF of this architecture can"
        )

    @property
    def is_yarn(self) -> bool:
        return bool(self.raw("type") == "yarn")
