"""Adapters in a checkpoint folder: files of an adapter (PEFT, MLX), and adapters inside the weights that were never merged.

Converting weights without the adapter that lies beside them would give another model. `adapter_config` reads LoRA's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line

CONFIG = "adapter_config.json"
MERGED = "yarn_edge.adapters"  # in a GGUF: what was merged into its weights, by name, with weights other than 1
_FILES = (
    CONFIG,
    "adapter_model*.safetensors",
    "adapter_model*.bin",
    "adapter_model*.index.json",
    "non_lora_trainables.bin",
    "pytorch_adapter.bin",
    "adapters.safetensors",
    "*_adapters.safetensors",
)
# peft.PeftType: what adds inputs or layers instead of changing weights cannot be merged into them.
UNMERGEABLE = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
        "XLORA",
    }
)
_PEFT = (
    "merge it first (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload(), then save_pretrained) and convert the "
    "merged model"
)
_LORA = "merge it first (yarn-edge convert BASE --adapter DIR; or peft's merge_and_unload() and save_pretrained)"
_MLX = "merge it first (mlx_lm.fuse) and convert the merged model"
# What peft adds to the names of a model's tensors (peft/utils/constants.py, peft/tuners).
_INSIDE = re.compile(
    r"(?:^|\.)(?:lora_(?:[AB]|embedding_[AB]|magnitude_vector)\b|base_layer\.|modules_to_save\.|original_module\.|ia3_l\b|"
    r"hada_w[12]|lokr_w[12]|oft_[rR]\b|boft_[RsP]\b|vera_lambda_|randlora_|fourierft_spectrum|token_adapter\.|"
    r"trainable_tokens_|prompt_encoder\.|adaption_)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter. files: their names. what: its kind and its base, for people. remedy: how to get one model of the two."""

    files: tuple[str, ...]
    what: str
    remedy: str


def adapter_files(folder: Path) -> tuple[str, ...]:
    """The names of the files in a folder that belong to an adapter, sorted."""
    return tuple(sorted({path.name for pattern in _FILES for path in folder.glob(pattern)}))


def described(files: tuple[str, ...], config: Mapping[str, Any]) -> Adapter:
    """What kind of adapter these files are. config: the contents of adapter_config.json, {} without one."""
    kind, base, remedy = config.get("peft_type"), config.get("base_model_name_or_path"), _PEFT
    if kind == "LORA":
        remedy = _LORA
    if kind is None and "fine_tune_type" in config:
        kind, base, remedy = config["fine_tune_type"], config.get("model"), _MLX
    if isinstance(kind, str) and kind in UNMERGEABLE:
        remedy = "it cannot be merged into weights, so no GGUF can hold it"
    name = f"{one_line(kind, 40)} adapter" if isinstance(kind, str) else "adapter"
    if config.get("use_dora") is True:
        name += " with DoRA"
    what = ("an " if name[0] in "aeiouAEIOU" else "a ") + name
    if isinstance(base, str) and base:
        what += f" of {one_line(base, 100)}"
    return Adapter(files, what, remedy)


def refuse_unmerged(source: str, names: Iterable[str]) -> None:
    """Raise YarnEdgeError if one of the weights' names belongs to an adapter that was saved without merging.

    source: the checkpoint, for messages.
    """
    for name in names:
        if _INSIDE.search(name):
            raise YarnEdgeError(
                f"{source}: tensor {one_line(name, 100)} belongs to an adapter that was not merged into the weights: load the model "
                "with peft, call merge_and_unload() and save_pretrained"
            )


def model_name(folder: Path) -> str:
    """The folder's name, or the model's in the layout of the Hugging Face cache (models--ORG--NAME/snapshots/HASH)."""
    folder = folder.absolute()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.split("--")[-1] if cached else folder.resolve().name


def path_and_number(text: str, is_there: Callable[[Path], bool] = Path.exists) -> tuple[str, float]:
    """PATH or PATH=NUMBER, as --adapter and --lora take them. The number is 1 without one, and NaN if it is none.

    A path with "=" in its name that `is_there` is taken whole.
    """
    path, equals, number = text.rpartition("=")
    if not equals or is_there(Path(text)):
        return text, 1.0
    try:
        return path, float(number)
    except ValueError:
        return path, math.nan
