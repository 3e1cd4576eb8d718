"""A GGUF adapter next to its base: refused before llama.cpp sees it if it is not one, or is another model's.

llama.cpp reports some of this and asserts the rest, which ends the process (llama-adapter.cpp, llama-graph.cpp, gguf.cpp), as of
llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import math

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile, TensorInfo

KIND, ALPHA = "adapter.type", "adapter.lora.alpha"
LORA_A, LORA_B = ".lora_a", ".lora_b"
_ALORA = "adapter.alora.invocation_tokens"
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
_TYPES = ("F32", "F16", "BF16", "Q8_0")  # which ggml multiplies, and looks rows up in
_F32_KEY = 6  # enum gguf_type


def is_norm(weight: str) -> bool:
    """Whether a tensor is a norm's: llama.cpp multiplies with it, and leaves out what an adapter has for it without a word."""
    return weight.endswith("norm.weight")


def check_adapter(adapter: GGUFFile, base: GGUFFile) -> None:
    """Raise YarnEdgeError, with the file and what is wrong, unless the adapter can be added to the base."""
    path = adapter.path
    if adapter.metadata.get("general.type") != "adapter" or adapter.metadata.get(KIND) != "lora":
        raise YarnEdgeError(
            f"{path}: is not a LoRA adapter as GGUF (general.type, {KIND}): make one with convert --as-adapter"
        )
    if adapter.architecture != base.architecture:
        raise YarnEdgeError(
            f"{path}: is an adapter of {one_line(adapter.architecture, 40)}, but {base.path.name} is {base.architecture}"
        )
    alpha = adapter.entries.get(ALPHA)
    if alpha is not None and alpha.kind != _F32_KEY:
        raise adapter.wrong(ALPHA, "llama.cpp reads a float32 there, and ends the process for anything else")
    if alpha is not None and not math.isfinite(adapter.metadata[ALPHA]):
        raise adapter.wrong(ALPHA, "must be a finite number: make the adapter again with convert --as-adapter")
    if _ALORA in adapter.metadata:
        raise YarnEdgeError(f"{path}: {_ALORA}: acts only after certain tokens (aLoRA), which yarn-edge does not do")
    if len(adapter.shards) > 1:
        raise YarnEdgeError(
            f"{path}: is split into {len(adapter.shards)} files, and llama.cpp reads an adapter from one"
        )
    names = set()
    for name in adapter.tensors:
        weight = name.removesuffix(LORA_A if name.endswith(LORA_A) else LORA_B)
        if weight == name:
            raise YarnEdgeError(
                f"{path}: tensor {one_line(name, 100)} is neither {LORA_A} nor {LORA_B}: llama.cpp does without it"
            )
        names.add(weight)
    if not names:
        raise YarnEdgeError(f"{path}: the adapter has no tensors")
    for weight in sorted(names):
        _check_pair(adapter, base, weight)


def _check_pair(adapter: GGUFFile, base: GGUFFile, weight: str) -> None:
    a, b = (adapter.tensors.get(weight + end) for end in (LORA_A, LORA_B))
    name = one_line(weight, 100)
    if a is None or b is None:
        raise YarnEdgeError(f"{adapter.path}: tensor {name}{LORA_A if a is None else LORA_B} is missing")
    of = base.tensors.get(weight)
    if of is None:
        raise YarnEdgeError(
            f"{adapter.path}: tensor {name} is not in {base.path.name}: the adapter belongs to another base"
        )
    for tensor in (a, b):
        if tensor.type_name not in _TYPES:
            raise YarnEdgeError(
                f"{adapter.path}: tensor {one_line(tensor.name, 100)} is {tensor.type_name}, not one of {', '.join(_TYPES)}"
            )
    if is_norm(weight):
        raise YarnEdgeError(
            f"{adapter.path}: tensor {name} is a norm, to which llama.cpp adds nothing: merge the adapter"
        )
    if weight == _EMBEDDINGS and _OUTPUT not in base.tensors:
        raise YarnEdgeError(
            f"{adapter.path}: tensor {name} is also the head of {base.path.name}, where llama.cpp cannot add to it: merge the adapter"
        )
    if not _fits(a, b, of, weight == _EMBEDDINGS):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (a, b, of))
        raise YarnEdgeError(
            f"{adapter.path}: {name} has other sizes than in {base.path.name} (A, B and the weight: {shapes}): the adapter belongs to "
            "another base"
        )


def _fits(a: TensorInfo, b: TensorInfo, of: TensorInfo, embeddings: bool) -> bool:
    """Whether B times A is of the weight's shape. Shapes are in ggml's order."""

    def three(tensor: TensorInfo) -> tuple[int, ...]:
        return (*tensor.shape, 1, 1, 1)[:3] if len(tensor.shape) <= 3 else (0, 0, 0)

    (a0, a1, a2), (b0, b1, b2), (w0, w1, w2) = three(a), three(b), three(of)
    if not w0:
        return False
    if embeddings:
        return (a0, a1, b1) == (b0, w1, w0) and a2 == b2 == w2 == 1
    return (a0, b1, a1) == (w0, w1, b0) and a2 == b2 == w2
