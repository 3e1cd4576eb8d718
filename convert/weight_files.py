"""The files of a checkpoint folder that hold its weights, chosen in transformers' order (modeling_utils.py:
_get_resolved_checkpoint_files): model.safetensors, its index, pytorch_model.bin, its index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from yarn_edge.checkpoint.config_file import ConfigFile, read_json, shown
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import is_named

INDEX = ".index.json"
# The whole file, and the pattern of its shards and variants.
FORMATS = (("model.safetensors", "model*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin"))
# What else may lie there, what it is, and what to do.
OTHERS = (
    ("consolidated*.safetensors", "Mistral's own layout: take model*.safetensors of the same repository"),
    ("consolidated*.pth", "Meta's own layout: take the repository in transformers' layout"),
    ("*.gguf", "a GGUF already: pass the file to yarn-edge quantize"),
    ("global_step*", "DeepSpeed's state: run zero_to_fp32.py in its folder"),
    ("pytorch_model_fsdp*", "FSDP's state: run accelerate merge-weights"),
    ("checkpoint-*", "a trainer's checkpoint: pass that folder"),
    ("tf_model*.h5", "TensorFlow's format: save the model as safetensors"),
    ("flax_model*.msgpack", "Flax's format: save the model as safetensors"),
    ("*.onnx", "ONNX, which holds no weights that can be converted: take the original checkpoint"),
    ("*.safetensors", "another name: if it holds the weights, rename it to model.safetensors"),
)


@dataclass(frozen=True)
class WeightFiles:
    """files: in the order of their names. index: file by tensor, None for a whole file. note: what was left aside, or ""."""

    files: tuple[Path, ...]
    index: dict[str, str] | None = None
    note: str = ""


def find_weights(folder: Path, config: ConfigFile) -> WeightFiles:
    """The files that transformers would load. Raises YarnEdgeError if there are none, or two sets of them."""
    named = config.values.get("transformers_weights")
    if named is not None:
        return _named(folder, config, named)
    for whole, _pattern in FORMATS:
        found = _of_format(folder, whole)
        if found is not None:
            return found
    for whole, pattern in FORMATS:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(files) == 1:
            return WeightFiles((files[0],))
        if files:
            names = one_line(", ".join(path.name for path in files), 100)
            raise YarnEdgeError(f"{folder}: has {len(files)} files of weights ({names}), but {whole}{INDEX} is missing")
    raise YarnEdgeError(f"{folder}: has no model*.safetensors and no pytorch_model*.bin{_instead(folder)}")


def _named(folder: Path, config: ConfigFile, name: object) -> WeightFiles:
    """The file or index that config.json names itself, as transformers reads it."""
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors" + INDEX))
    ):
        raise config.error(
            "transformers_weights", f"is {shown(name)}, not a safetensors file of this folder or its index"
        )
    if not is_named(folder / name):
        raise config.error("transformers_weights", f"is {shown(name)}, which is missing")
    return _of_index(folder / name) if name.endswith(INDEX) else WeightFiles((folder / name,))


def _of_format(folder: Path, whole: str) -> WeightFiles | None:
    index, file = folder / (whole + INDEX), folder / whole
    if not is_named(file):
        return _of_index(index) if is_named(index) else None
    others = [path for path in _of_index(index, must_exist=False).files if path != file] if is_named(index) else []
    if any(map(is_named, others)):
        raise YarnEdgeError(f"{folder}: has {whole} and other files named by {index.name}: remove one of the two sets")
    return WeightFiles(
        (file,), note=f"note: {index.name} names files that are missing: {whole} is read instead" if others else ""
    )


def _of_index(index: Path, must_exist: bool = True) -> WeightFiles:
    """The shards that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise YarnEdgeError(f"{index}: weight_map is missing or does not map names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise YarnEdgeError(f"{index}: weight_map names {one_line(name, 100)}, outside the folder")
        if must_exist and not is_named(index.parent / name):
            raise YarnEdgeError(
                f"{index.parent / one_line(name, 300)}: the shard is missing, but {index.name} names it"
            )
    return WeightFiles(tuple(index.parent / name for name in names), weight_map)


def _instead(folder: Path) -> str:
    """What the folder holds that could be meant, for the message that it has no weights."""
    for pattern, what in OTHERS:
        for path in sorted(folder.glob(pattern)):
            return f"; {one_line(path.name, 60)} is {what}"
    return ""
