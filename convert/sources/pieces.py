"""What a reader of quantized weights works on: the tensors of a checkpoint, from which it takes those that it knows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from yarn_edge.checkpoint.config_file import ConfigFile, shown
from yarn_edge.errors import YarnEdgeError, one_line

from ..stored import Tensor

_Known = TypeVar("_Known", bound=object)
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass
class Pieces:
    """source: the checkpoint, for messages. config: its quantization_config. left: tensors that nobody has taken, by name.

    made: by the name of the tensor in whose place it stands, the dequantized one.
    """

    source: str
    config: ConfigFile
    left: dict[str, Tensor]
    made: dict[str, Tensor] = field(default_factory=dict)

    def error(self, name: str, what: str) -> YarnEdgeError:
        """An error that names the checkpoint and a tensor."""
        return YarnEdgeError(f"{self.source}: tensor {one_line(name, 100)} {what}")

    def ending(self, *ends: str) -> Iterator[tuple[str, str]]:
        """(module, name) of the tensors that are there now and whose names end so."""
        for name in list(self.left):
            end = next((end for end in ends if name.endswith(end)), None)
            if end is not None and name in self.left:
                yield name.removesuffix(end), name

    def take(self, name: str, dtypes: Sequence[str], shape: Sequence[int] | None = None, of: str = "") -> Tensor:
        """The tensor of this name, which must be there, of one of these types, and of this shape if one is given.

        of: the weight that it belongs to, for messages.
        """
        if name not in self.left:
            beside = f": {one_line(of, 100)} cannot be dequantized without it" if of else ""
            raise self.error(name, f"is missing{beside}")
        tensor = self.left.pop(name)
        if tensor.dtype not in dtypes:
            raise self.error(name, f"has dtype {one_line(tensor.dtype, 20)}, expected {' or '.join(dtypes)}")
        if shape is not None and tensor.shape != tuple(shape):
            raise self.error(name, f"has the shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def put(self, name: str, at: str, tensor: Tensor) -> None:
        """A dequantized tensor, in the place of the tensor `at`."""
        if name in self.left:
            raise self.error(name, f"is there beside {one_line(at, 100)}: remove one of them")
        self.made[at] = tensor

    def choice(self, key: str, known: Sequence[_Known]) -> _Known:
        """A value of quantization_config that must be one of these; None stands for null and absent."""
        value = self.config.values.get(key)
        if value in known:
            return known[known.index(value)]
        names = ", ".join("null" if other is None else str(other) for other in known)
        raise self.config.error(key, f"is {shown(value)}, which cannot be dequantized here (known: {names})")

    def matrix(self, name: str, stacked: bool = False) -> Tensor:
        """The tensor of this name, not taken, which must be a matrix, or several of them."""
        tensor = self.left[name]
        if len(tensor.shape) not in ((2, 3) if stacked else (2,)) or 0 in tensor.shape:
            raise self.error(name, f"has dtype {tensor.dtype} and the shape {list(tensor.shape)}, expected a matrix")
        return tensor


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression matches at the beginning of a name; False if it is none."""
    try:
        return re.match(pattern, name) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def kind_of(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return _INDEX.sub("*", name)
