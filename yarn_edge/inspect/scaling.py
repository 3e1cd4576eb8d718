"""The scaling that a model was made for, whether the model is a checkpoint folder or a GGUF."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions.scaling import RopeScaling


def model_scaling(path: str | Path, *, freeze_at: int | None = None) -> RopeScaling:
    """The scaling of a checkpoint, read from its config, or of a GGUF, read from its own description.

    For a GGUF without a `yarn_edge.rope.*` description, the scaling is what its `{arch}.rope.*` keys declare; what llama.cpp
    really runs may differ (`inspect_model` shows both). freeze_at: for dynamic scaling in a checkpoint, the length in tokens
    whose angles are taken. Raises YarnEdgeError if the scaling is unknown, contradictory, or differs by layer.
    """
    path = Path(path)
    if path.is_dir():
        return read_scaling(read_config(path), ScalingOverrides(freeze_at=freeze_at))
    if freeze_at is not None:
        raise YarnEdgeError(f"{path}: freeze_at is for checkpoints; a GGUF is static")
    return FilePositions(read_gguf(path, vocabulary=False)).wanted
