"""What is asked for: a base and the adapters to put on it, by their folders and weights."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.checkpoint.adapter import model_name, path_and_number
from yarn_edge.checkpoint.adapter_config import FLOAT32_MAX
from yarn_edge.errors import YarnEdgeError, one_line


@dataclass(frozen=True)
class AdapterRequest:
    """An adapter's folder, and how much of it is added: 1 for what was trained."""

    folder: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterRequest:
        """From DIR or DIR=WEIGHT. Raises YarnEdgeError."""
        folder, weight = path_and_number(text, Path.is_dir)
        if not abs(weight) <= FLOAT32_MAX:
            why = "more than float32 holds" if math.isfinite(weight) else "not a number"
            given = one_line(repr(text.rpartition("=")[2]), 40)
            raise YarnEdgeError(f"--adapter {one_line(text, 200)}: {given} is {why}")
        return cls(Path(folder), weight)

    @property
    def name(self) -> str:
        """The model's name, with the weight unless that is 1."""
        return model_name(self.folder) + ("" if self.weight == 1 else f"={self.weight:g}")


@dataclass(frozen=True)
class AdaptedCheckpoint:
    """A base with adapters. base: its folder; None for the one that the first adapter names, if it is on this disk."""

    base: str | Path | None
    adapters: tuple[AdapterRequest, ...]

    @classmethod
    def of(cls, base: str | Path | None, *adapters: str | Path) -> AdaptedCheckpoint:
        """From folders, as --adapter takes them: DIR or DIR=WEIGHT."""
        return cls(base, tuple(AdapterRequest.parse(str(adapter)) for adapter in adapters))

    @property
    def files(self) -> list[Path]:
        """The files in the folders that are named."""
        folders = [*([] if self.base is None else [Path(self.base)]), *(request.folder for request in self.adapters)]
        return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def add_adapter_flags(parser: argparse.ArgumentParser) -> None:
    """--adapter and --as-adapter."""
    group = parser.add_argument_group("adapters")
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="folder of a LoRA adapter (PEFT) to merge into the weights, times WEIGHT (default: 1); may be repeated. Without "
        "CHECKPOINT, the base is the one that the adapter names, if it is on this disk",
    )
    group.add_argument(
        "--as-adapter",
        action="store_true",
        help="write the adapters as a GGUF adapter in float32, for --lora, without the base",
    )
