"""adapter_config.json of a LoRA adapter: the scale of each module, and what cannot be merged into weights, with the reason.

Names, defaults and rules are PEFT's (peft/tuners/lora/config.py, model.py; get_pattern_key in peft/utils/other.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.adapter import CONFIG, UNMERGEABLE
from yarn_edge.checkpoint.config_file import ConfigFile, is_whole, read_json, shown
from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import is_named

MAX_RANK = 1 << 16
_MAX_PATTERN, _MAX_PATTERNS = 200, 10_000
FLOAT32_MAX = 3.4028234663852886e38
# Repeated groups, and many repeats, take a regular expression hours to match.
_SLOW = re.compile(r"\)[*+{]|(?:[*+{].*){4}")
_PEFT = "merge it with peft (merge_and_unload, then save_pretrained) and convert the merged model"
_NEVER = "no merged weight can do that: run it with peft"
# key -> what a value other than null, false or empty means, and what to do
_REFUSED = {
    "alora_invocation_tokens": ("starts to act only after certain tokens (aLoRA)", _NEVER),
    "arrow_config": ("chooses among adapters for each token (Arrow)", _NEVER),
    "layer_replication": ("repeats layers of its base", _PEFT),
    "target_parameters": ("changes stacked experts as one parameter", _PEFT),
    "use_qalora": ("pools its input in groups (QA-LoRA)", _NEVER),
    "use_bdlora": ("has block-diagonal matrices (BD-LoRA)", _PEFT),
    "monteclora_config": ("samples its weights (MonteCLoRA)", _PEFT),
    "kasa_config": ("has singular values of its own (KaSA)", _PEFT),
}
# init_lora_weights that take the adapter's first values out of the base, so that it belongs to another base than the one named.
_TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraConfig:
    """What the config says of a LoRA adapter. rank, alpha: of modules that no pattern names; `scale_of` has those of a module.

    tokens: by module name, the rows of an embedding that were trained (trainable_token_indices). base: where it was trained on,
    as it says, with the revision; "" if it does not.
    """

    file: ConfigFile
    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    tokens: Mapping[str, tuple[int, ...]]
    base: str
    revision: str
    fan_in_fan_out: bool
    dora: bool

    def scale_of(self, module: str) -> tuple[int, float]:
        """(rank, scale) of a module by its name in the model. The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank = _matching(self.ranks, module, self.rank)
        alpha = _matching(self.alphas, module, self.alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.rslora else rank)


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a name, from a dot on."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_lora_config(folder: Path) -> LoraConfig:
    """The config of the adapter in a folder. Raises YarnEdgeError for anything that cannot be merged, with the reason."""
    if not folder.is_dir():
        what = "is a file, expected the folder of an adapter" if folder.exists() else "no such folder"
        raise YarnEdgeError(f"{folder}: {what}")
    path = folder / CONFIG
    if not is_named(path):
        raise YarnEdgeError(f"{folder}: has no {CONFIG}, so it is not the folder of an adapter")
    file = ConfigFile(str(path), read_json(path))
    _check_kind(file)
    for key, (what, remedy) in _REFUSED.items():
        if file.values.get(key):
            raise file.error(key, f"is {shown(file.values[key])}: the adapter {what}; {remedy}")
    start = file.values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_TAKEN_OUT):
        raise file.error(
            "init_lora_weights",
            f"is {shown(start)}: the adapter's first values were taken out of its base. Save it with "
            "path_initial_model_for_weight_conversion, or, if the base here is what was left, set init_lora_weights to true",
        )
    rank = file.required_integer("r")
    if rank > MAX_RANK:
        raise file.error("r", f"is {rank}, more than {MAX_RANK}")
    return LoraConfig(
        file,
        rank,
        _number(file, "lora_alpha", file.values.get("lora_alpha", 8)),
        bool(file.boolean("use_rslora")),
        {key: _rank(file, key, value) for key, value in _patterns(file, "rank_pattern").items()},
        {key: _number(file, f"alpha_pattern.{key}", v) for key, v in _patterns(file, "alpha_pattern").items()},
        _tokens(file),
        _text(file, "base_model_name_or_path"),
        _text(file, "revision"),
        bool(file.boolean("fan_in_fan_out")),
        bool(file.boolean("use_dora")),
    )


def _check_kind(file: ConfigFile) -> None:
    kind = file.values.get("peft_type")
    if kind == "LORA":
        return
    if kind is None and "fine_tune_type" in file.values:
        raise YarnEdgeError(
            f"{file.name}: is an adapter of MLX: merge it with mlx_lm.fuse and convert the merged model"
        )
    remedy = _NEVER if isinstance(kind, str) and kind in UNMERGEABLE else _PEFT
    raise file.error("peft_type", f"is {shown(kind)}: only LORA is merged here; {remedy}")


def _text(file: ConfigFile, key: str) -> str:
    value = file.values.get(key)
    return value if isinstance(value, str) else ""


def _number(file: ConfigFile, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise file.error(key, f"is {'null' if value is None else shown(value)}, expected a number")
    if not abs(value) <= FLOAT32_MAX:
        raise file.error(key, f"is {shown(value)}, which is not a finite number in float32: correct it")
    return float(value)


def _rank(file: ConfigFile, key: str, value: Any) -> int:
    if not is_whole(value) or not 0 < value <= MAX_RANK:
        raise file.error(f"rank_pattern.{key}", f"is {shown(value)}, expected a whole number from 1 to {MAX_RANK}")
    return int(value)


def _patterns(file: ConfigFile, key: str) -> dict[str, Any]:
    """A mapping from regular expressions, each of which can be compiled and matched in time."""
    patterns = file.values.get(key) or {}
    if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
        raise file.error(key, f"is {shown(patterns)}, expected an object of at most {_MAX_PATTERNS} names")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise file.error(key, f"has {shown(pattern)}, which is not a regular expression: {error}") from error
        if len(pattern) > _MAX_PATTERN or _SLOW.search(pattern):
            raise file.error(key, f"has {shown(pattern)}, which could take too long to match: write the modules' names")
    return patterns


def _tokens(file: ConfigFile) -> dict[str, tuple[int, ...]]:
    """trainable_token_indices: a list is of the embeddings."""
    value = file.values.get("trainable_token_indices") or {}
    named = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(named, dict):
        raise file.error("trainable_token_indices", f"is {shown(value)}, expected a list or an object of lists")
    for rows in named.values():
        if (
            not isinstance(rows, list)
            or not all(type(row) is int and row >= 0 for row in rows)
            or len({*rows}) < len(rows)
        ):
            raise file.error("trainable_token_indices", f"is {shown(value)}, expected different ids of tokens")
    return {name: tuple(rows) for name, rows in named.items()}
