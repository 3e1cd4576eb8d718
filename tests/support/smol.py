"""The real small model, SmolLM2-135M with YaRN factor 4, on the shelf: a checkpoint and what `convert` makes of it."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.bench.demo import YARN
from yarn_edge.bench.evidence.smollm2 import write_checkpoint
from yarn_edge.convert.hf_to_gguf import convert

from .made_once import Shelf

QUANTS = ("F16", "Q8_0", "Q4_K_M")


def checkpoint(shelf: Shelf, n_layers: int) -> Path:
    """Llama in float32, cut to its first `n_layers` layers."""

    def make(folder: Path) -> None:
        write_checkpoint(folder / "f32", dtype="F32", config=YARN, n_layers=n_layers)

    return shelf.made_once(f"smol-{n_layers}", make) / "f32"


def f32(shelf: Shelf, n_layers: int) -> Path:
    """The checkpoint as a float32 GGUF."""

    def make(folder: Path) -> None:
        convert(checkpoint(shelf, n_layers), str(folder / "smol-F32.gguf"), "F32")

    return shelf.made_once(f"smol-{n_layers}-f32", make) / "smol-F32.gguf"


def quants(shelf: Shelf, n_layers: int) -> dict[str, Path]:
    """The checkpoint as F16, Q8_0 and Q4_K_M."""

    def make(folder: Path) -> None:
        convert(checkpoint(shelf, n_layers), str(folder / "smol-{quant}.gguf"), ",".join(QUANTS))

    folder = shelf.made_once(f"smol-{n_layers}-quants", make)
    return {name: folder / f"smol-{name}.gguf" for name in QUANTS}
