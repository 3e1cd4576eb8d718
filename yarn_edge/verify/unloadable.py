"""Which tensors of a checkpoint keep transformers from loading it, by name: its own errors point to a log that is not shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.quantized import declared_method, is_marked
from yarn_edge.errors import YarnEdgeError, one_line


class DeclaredTensors(Protocol):
    """The tensors of a checkpoint's files."""

    def targets(self, model: Any) -> dict[str, str]:
        """Name in the files -> name in the model."""

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor in its file."""


def first_of(names: Sequence[str], remark: str = "") -> str:
    """The first of some names, a remark about it, and how many others there are."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{one_line(names[0], 100)}{remark}{others}"


def refuse_unloadable(folder: Path, files: DeclaredTensors, model: Any, found: Any) -> None:
    """Raise YarnEdgeError for tensors of a wrong shape, and for experts that cannot be stacked. found: transformers' LoadStateDictInfo."""
    wrong = {name: (list(theirs), list(wanted)) for name, theirs, wanted in found.mismatched_keys}
    if not wrong and not found.conversion_errors:
        return
    targets = files.targets(model)
    for target in sorted(wrong.keys() | found.conversion_errors.keys()):
        value = model.state_dict().get(target)
        if value is not None and value.dim() == 3:
            shapes = {name: files.shape(name) for name, goes_to in targets.items() if goes_to == target}
            matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
            _refuse_experts(folder, matrices, value.shape[0])
    if wrong:
        names = sorted(wrong)
        theirs, wanted = wrong[names[0]]
        remark = f", of shape {theirs} where the config implies {wanted},"
        raise YarnEdgeError(f"{folder}: transformers cannot load {first_of(names, remark)}: no reference")
    target, why = min(found.conversion_errors.items())
    raise YarnEdgeError(f"{folder}: transformers cannot load {one_line(target, 100)}: {one_line(_last_line(why), 200)}")


def _last_line(why: Any) -> str:
    """transformers' own words, which follow a traceback."""
    return (str(why).strip().splitlines() or [""])[-1]


def _refuse_experts(folder: Path, parts: Mapping[str, Sequence[int]], n_experts: int) -> None:
    """Raise YarnEdgeError for the first expert that is missing among its kind, or that has another shape. parts: shapes by name."""
    kinds: dict[tuple[str, str], dict[int, Sequence[int]]] = {}
    for name, shape in parts.items():
        front, number, back = _numbered(name)
        kinds.setdefault((front, back), {})[number] = shape
    missing = [f"{a}{n}{b}" for (a, b), there in sorted(kinds.items()) for n in range(n_experts) if n not in there]
    if missing:
        raise YarnEdgeError(f"{folder}: transformers does not find {first_of(missing)}: no reference")
    for (front, back), shapes in sorted(kinds.items()):
        usual = Counter(map(tuple, shapes.values())).most_common(1)[0][0]
        others = [n for n in sorted(shapes) if tuple(shapes[n]) != usual]
        if others:
            remark = f", of shape {list(shapes[others[0]])} where other experts have {list(usual)},"
            names = [f"{front}{n}{back}" for n in others]
            raise YarnEdgeError(f"{folder}: transformers cannot load {first_of(names, remark)}: no reference")


def _numbered(name: str) -> tuple[str, int, str]:
    """(what is before the last number between dots, that number, what is behind it); -1 without one."""
    parts = name.split(".")
    at = max((i for i, part in enumerate(parts) if part.isdecimal()), default=None)
    if at is None:
        return name, -1, ""
    return ".".join(parts[:at]) + ".", int(parts[at]), "." + ".".join(parts[at + 1 :])


def refuse_quantized_weights(folder: Path) -> None:
    """Raise YarnEdgeError if the config names a method of quantization and weights are quantized: the reference takes floats alone."""
    from safetensors import safe_open

    method = declared_method(read_config(folder))
    for path in sorted(folder.glob("*.safetensors")) if method and not method.read_as else ():
        with safe_open(path, "numpy") as file:
            name = next(filter(is_marked, file.keys()), None)
        if method and name is not None:
            raise YarnEdgeError(
                f"{folder}: its weights are quantized by {method.title} (tensor {one_line(name, 100)}), and the reference takes floats: "
                f"compare with a copy in floats ({method.remedy})"
            )
