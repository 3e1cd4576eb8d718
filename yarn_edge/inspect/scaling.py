"""The scaling that a model was made for, whether the model is a checkpoint folder or a GGUF."""

from __future__ import annotations

from pathlib import Path

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import Reading, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions.scaling import RopeScaling


def model_scaling(
    path: str | Path, *, freeze_at: int | None = None, attention_factor_reading: Reading | None = None
) -> RopeScaling:
    """The scaling of a checkpoint, read from its config, or of a GGUF, read from its own description.

    For a GGUF without a `yarn_edge.rope.*` description, the scaling is what its `{arch}.rope.*` keys declare; what llama.cpp
    really runs may differ (`inspect_model` shows both). freeze_at: for dynamic scaling in a checkpoint, the length in tokens
    whose angles are taken. attention_factor_reading: of an attn_factor in a checkpoint. Raises YarnEdgeError if the scaling is
    unknown, contradictory, or differs by layer.
    """
    path = Path(path)
    overrides = ScalingOverrides(freeze_at=freeze_at, attention_factor_reading=attention_factor_reading)
    if path.is_dir():
        return read_scaling(read_config(path), overrides)
    for flag in overrides.for_checkpoints:
        name = flag.removeprefix("--").replace("-", "_")
        raise YarnEdgeError(f"{path}: {name} is for checkpoints; a GGUF is static")
    return FilePositions(read_gguf(path, vocabulary=False)).wanted
