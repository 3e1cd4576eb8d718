"""The files of a checkpoint folder that hold its weights, chosen in transformers' order (modeling_utils.py:
_get_resolved_checkpoint_files): model.safetensors, its index, pytorch_model.bin, its index.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from yarn_edge.checkpoint.config_file import ConfigFile, read_config, read_json, shown
from yarn_edge.checkpoint.quantized import declared_method
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.hub.checkpoint import streamed_checkpoint, whole_checkpoint
from yarn_edge.hub.reference import is_reference, parse_reference
from yarn_edge.hub.weights import RemoteWeights
from yarn_edge.progress import note
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


def find_checkpoint(checkpoint: str | Path) -> tuple[Path, RemoteWeights | None]:
    """The folder of a checkpoint, and the weights that are not in it: those of hf:ORG/NAME, whose other files come to the cache."""
    folder = Path(checkpoint)
    if not is_reference(checkpoint) or folder.exists():
        return folder, None
    reference = parse_reference(checkpoint)
    found = streamed_checkpoint(reference)
    method = declared_method(read_config(found.folder))
    if method and (method.read_as or method.dequantized):  # each of its slices is read in two places far apart
        note(f"note: {reference}: {method.title} weights cannot be streamed: the checkpoint is downloaded to the cache")
        return whole_checkpoint(reference), None
    return found.folder, found.weights


def whole_folder(checkpoint: str | Path) -> Path:
    """The folder of a checkpoint or an adapter; hf:ORG/NAME is downloaded to the cache."""
    folder = Path(checkpoint)
    return folder if not is_reference(checkpoint) or folder.exists() else whole_checkpoint(parse_reference(checkpoint))


@dataclass(frozen=True)
class _Folder:
    """A folder, with the names of files that belong into it and lie elsewhere."""

    path: Path
    elsewhere: Collection[str]

    def has(self, name: str) -> bool:
        return name in self.elsewhere or is_named(self.path / name)

    def matching(self, pattern: str) -> list[Path]:
        here = {path for path in self.path.glob(pattern) if path.is_file()}
        return sorted(here | {self.path / name for name in self.elsewhere if fnmatchcase(name, pattern)})


def find_weights(path: Path, config: ConfigFile, elsewhere: Collection[str] = ()) -> WeightFiles:
    """The files that transformers would load. elsewhere: names of files that belong into the folder, but are not in it.

    Raises YarnEdgeError if there are none, or two sets of them.
    """
    folder = _Folder(path, elsewhere)
    named = config.values.get("transformers_weights")
    if named is not None:
        return _named(folder, config, named)
    for whole, _pattern in FORMATS:
        found = _of_format(folder, whole)
        if found is not None:
            return found
    for whole, pattern in FORMATS:
        files = folder.matching(pattern)
        if len(files) == 1:
            return WeightFiles((files[0],))
        if files:
            names = one_line(", ".join(file.name for file in files), 100)
            raise YarnEdgeError(f"{path}: has {len(files)} files of weights ({names}), but {whole}{INDEX} is missing")
    raise YarnEdgeError(f"{path}: has no model*.safetensors and no pytorch_model*.bin{_instead(folder)}")


def _named(folder: _Folder, config: ConfigFile, name: object) -> WeightFiles:
    """The file or index that config.json names itself, as transformers reads it."""
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or not name.endswith((".safetensors", ".safetensors" + INDEX))
    ):
        raise config.error(
            "transformers_weights", f"is {shown(name)}, not a safetensors file of this folder or its index"
        )
    if not folder.has(name):
        raise config.error("transformers_weights", f"is {shown(name)}, which is missing")
    return _of_index(folder, name) if name.endswith(INDEX) else WeightFiles((folder.path / name,))


def _of_format(folder: _Folder, whole: str) -> WeightFiles | None:
    index, file = whole + INDEX, folder.path / whole
    if not folder.has(whole):
        return _of_index(folder, index) if folder.has(index) else None
    named = _of_index(folder, index, must_exist=False).files if folder.has(index) else ()
    others = [path for path in named if path != file]
    if any(folder.has(path.name) for path in others):
        raise YarnEdgeError(f"{folder.path}: has {whole} and other files named by {index}: remove one of the two sets")
    return WeightFiles(
        (file,), note=f"note: {index} names files that are missing: {whole} is read instead" if others else ""
    )


def _of_index(folder: _Folder, index_name: str, must_exist: bool = True) -> WeightFiles:
    """The shards that an index names."""
    index = folder.path / index_name
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise YarnEdgeError(f"{index}: weight_map is missing or does not map names to files")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise YarnEdgeError(f"{index}: weight_map names {one_line(name, 100)}, outside the folder")
        if must_exist and not folder.has(name):
            raise YarnEdgeError(
                f"{index.parent / one_line(name, 300)}: the shard is missing, but {index.name} names it"
            )
    return WeightFiles(tuple(index.parent / name for name in names), weight_map)


def _instead(folder: _Folder) -> str:
    """What the folder holds that could be meant, for the message that it has no weights."""
    for pattern, what in OTHERS:
        for path in sorted({*folder.path.glob(pattern), *folder.matching(pattern)}):
            return f"; {one_line(path.name, 60)} is {what}"
    return ""
