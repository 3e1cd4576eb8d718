"""A GGUF under examination: its header, the readings of its positions, and the commands that would fix it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.angle_error import AngleError
from yarn_edge.llama_rules.declared import open_attention_factor
from yarn_edge.llama_rules.description import is_described, is_live
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.positions.scaling import RopeScaling, yarn_attention_factor

PATCH = "yarn-edge patch MODEL.gguf -o FIXED.gguf"


@dataclass(frozen=True)
class Patient:
    """A file and its readings; a refused reading is None. refusals: the reasons.

    arguments: what a plain `llama_cpp.Llama` needs to run the file as wanted; None if no arguments help, or if a reading was
    refused. sliding: the file's own description of layers with a sliding window. error: how far what runs is from what is wanted, in
    the worst layer; None if they agree or either is unknown.
    """

    file: GGUFFile
    declared: RopeScaling | None
    effective: RopeScaling | None
    wanted: RopeScaling | None
    arguments: dict[str, Any] | None
    sliding: RopeScaling | None = None
    error: AngleError | None = None
    refusals: tuple[str, ...] = ()

    @classmethod
    def of(cls, positions: FilePositions) -> Patient:
        """The file of `positions`, with every reading that succeeds."""
        refusals: dict[str, str] = {}  # the fact, without the file and the key -> the first message with it

        def read(reading: Callable[[], RopeScaling | None]) -> RopeScaling | None:
            try:
                return reading()
            except YarnEdgeError as refusal:
                refusals.setdefault(str(refusal).rpartition(": ")[2], str(refusal))
                return None

        declared, wanted = read(lambda: positions.declared), read(lambda: positions.wanted)
        effective = read(positions.effective)
        sliding = read(lambda: positions.canonical_sliding)
        error = None if refusals else positions.error()
        arguments = None if refusals else positions.llama_class_arguments
        off = error if error is not None and error.any_difference else None
        return cls(positions.file, declared, effective, wanted, arguments, sliding, off, tuple(refusals.values()))

    def key(self, name: str) -> str:
        """The full name of `{arch}.rope.scaling.{name}`."""
        return f"{self.file.architecture}.rope.scaling.{name}"

    def raw(self, name: str) -> Any:
        """The unchecked value of a scaling key, None if it is absent."""
        return self.file.metadata.get(self.key(name))

    def number(self, name: str) -> float | None:
        """The value of a scaling key if it is a number, else None."""
        value = self.raw(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def is_yarn(self) -> bool:
        """Whether the scaling type is "yarn"."""
        return bool(self.raw("type") == "yarn")

    @property
    def is_ours(self) -> bool:
        """Whether the file carries its own description, which leaves nothing open."""
        return is_described(self.file)

    @property
    def unclear_factor(self) -> float | None:
        """A yarn_attn_factor with an open meaning: converters write both A itself and a multiplier of A there."""
        return open_attention_factor(self.file)

    @property
    def own_factors(self) -> tuple[float, ...]:
        """The values by which the file's own tensor divides the frequencies, () without one; (0.0,) if they are unknown.

        They are all 1 after a patch that turned a baked file into plain YaRN.
        """
        if FREQUENCY_FACTORS not in self.file.tensors:
            return ()
        reading = self.effective or self.declared
        return (0.0,) if reading is None or reading.frequency_factors is None else reading.frequency_factors

    def patch(self, *flags: str) -> str:
        """The patch command with `flags`, plus a flag for each value that the file leaves open."""
        needed = list(flags)
        told = any("--yarn-orig-ctx" in flag for flag in flags)
        if self.is_yarn and not self.is_ours and not self.number("original_context_length") and not told:
            needed.append("--yarn-orig-ctx N")
        if self.unclear_factor is not None and not any("--yarn-attention-factor" in flag for flag in flags):
            needed.append("--yarn-attention-factor A")
        return f"{PATCH} {' '.join(needed or ['--repair'])}"

    @property
    def repair(self) -> str:
        """How to make the file run what it describes; the runtime arguments if no file can."""
        if self.unclear_factor is not None:
            own, factor = self.unclear_factor, yarn_attention_factor(self.number("factor") or 1.0)
            return (
                f"{self.patch()}, where A is {own:.10g} if the checkpoint's config has this value as attention_factor (A itself), "
                f"{own * factor:.10g} if it is the Nous code's attn_factor (a multiplier)"
            )
        if self.wanted is None:
            return f"{self.patch()}, which reports what a file can carry"
        try:
            form = plan_rope(self.wanted, self.file.architecture, sliding=self.sliding).form
        except YarnEdgeError:
            return (
                f"no GGUF of architecture {self.file.architecture} carries this, and no runtime arguments help: run the model "
                "elsewhere, or accept these errors"
            )
        if form == "live" and is_live(self.file):
            return "yarn-edge puts the file's own positions into the running graph; no file can make other programs run them"
        if form == "live":
            return f"{self.patch()}; yarn-edge then puts them into the running graph, which other programs do not"
        if form != "arguments":
            return f"{self.patch()} (exact in every llama.cpp program)"
        if not self.arguments:
            return f"{self.patch()}; the file then needs runtime arguments, which yarn-edge passes by itself"
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return (
            f"yarn-edge passes it by itself; elsewhere use llama_cpp.Llama(path, {arguments}): no GGUF of this architecture "
            "carries it"
        )
