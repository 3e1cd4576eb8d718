"""Refuses a GGUF for which llama.cpp would call abort(), crash or never end, before llama.cpp sees the file.

That would end the whole Python process. These checks and those of `number_rules` and `vocabulary_rules` cover what llama.cpp
asserts instead of reporting (gguf.cpp, llama-model.cpp, llama-vocab.cpp, the graphs of the families we convert), as of
llama-cpp-python 0.3.36. What they do not know yet, the first load in a process of its own catches
(`yarn_edge.runtime.first_load`).
"""

from __future__ import annotations

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.number_rules import check_numbers
from yarn_edge.llama_rules.vocabulary_rules import check_vocabulary

ROPE_TYPES = ("none", "linear", "yarn", "longrope")
# Q8_1 and Q8_K are what ggml makes of the other operand; a weight of type Q8_1 is refused by llama.cpp itself.
NO_WEIGHTS = frozenset({"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"})
MAPPED_ALIGNMENT = 32  # ggml-impl.h: TENSOR_ALIGNMENT, which ggml asserts for the start of mapped weights


def check_loadable(file: GGUFFile) -> None:
    """Raise YarnEdgeError, with the file and the key, for values that would end the process."""
    _check_scaling_type(file)
    check_vocabulary(file)
    if file.tensors:
        _check_tensors(file)
        check_numbers(file)


def has_known_type(file: GGUFFile) -> bool:
    """Whether llama.cpp knows the file's `rope.scaling.type`, or takes its default."""
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "linear")
    return isinstance(kind, str) and kind in ROPE_TYPES


def _check_scaling_type(file: GGUFFile) -> None:
    key = f"{file.architecture}.rope.scaling.type"
    if not has_known_type(file):
        known = f"llama.cpp knows {', '.join(ROPE_TYPES)}: yarn-edge patch with --yarn-factor or --from CHECKPOINT replaces it"
        raise file.wrong(key, known)


def _check_tensors(file: GGUFFile) -> None:
    for tensor in file.tensors.values():
        name = one_line(tensor.name, 100)
        if tensor.type_name in NO_WEIGHTS or (len(tensor.shape) == 1 and tensor.type_name != "F32"):
            raise YarnEdgeError(
                f"{file.path}: tensor {name} of shape {list(tensor.shape)} is {tensor.type_name}, "
                "which llama.cpp does not compute with"
            )
        if tensor.offset % MAPPED_ALIGNMENT:
            raise YarnEdgeError(
                f"{tensor.path}: general.alignment is {file.alignment}, and tensor {name} is at byte {tensor.offset}; "
                f"llama.cpp maps weights only at multiples of {MAPPED_ALIGNMENT} bytes"
            )
