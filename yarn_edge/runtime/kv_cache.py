"""The KV cache: its types, and its size in bytes by context length.

K and V may have different types. One word says both: "q8_0" is the type of K and V, "q8_0/q4_0" is q8_0 for K and q4_0 for V.
"""

from __future__ import annotations

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.runtime.machine import available_bytes

# Types of the KV cache by llama.cpp's names: (enum ggml_type, bytes of one element = block bytes / block elements).
KV_TYPES: dict[str, tuple[int, float]] = {
    "f32": (0, 4.0), "f16": (1, 2.0), "bf16": (30, 2.0), "q8_0": (8, 34 / 32), "q5_1": (7, 24 / 32),
    "q5_0": (6, 22 / 32), "q4_1": (3, 20 / 32), "q4_0": (2, 18 / 32), "iq4_nl": (20, 18 / 32),
}  # fmt: skip
BLOCK = 32  # elements of every quantized type
UNQUANTIZED = ("f32", "f16", "bf16")
CTX_STEP = 256  # llama.cpp rounds contexts up to a multiple of this many tokens

# Architectures whose cache is one key and one value of every position in every layer.
PLAIN_CACHE = frozenset({"llama", "qwen2", "qwen3"})


def kv_types(kv_type: str, what: str = "--kv-type") -> tuple[str, str]:
    """(type of K, type of V), keys of KV_TYPES. what: names the value in errors. Raises YarnEdgeError for an unknown type."""
    k, slash, v = kv_type.partition("/")
    types = (k, v if slash else k)
    if not all(kind in KV_TYPES for kind in types):
        known = ", ".join(KV_TYPES)
        raise YarnEdgeError(f"{what} {kv_type!r} is unknown; known: {known}, and two of them as K/V, such as q8_0/q4_0")
    return types


def join_kv_types(k: str, v: str) -> str:
    """The word for K and V of these types."""
    return k if k == v else f"{k}/{v}"


def with_kv_parts(kv_type: str, k: str | None, v: str | None) -> str:
    """`kv_type` with K of type `k` and V of type `v`, the flags --kv-k and --kv-v; None keeps a part. Raises YarnEdgeError."""
    types = kv_types(kv_type)
    for flag, given in (("--kv-k", k), ("--kv-v", v)):
        if given is not None and given not in KV_TYPES:
            raise YarnEdgeError(f"{flag} {given!r} is unknown; known: {', '.join(KV_TYPES)}")
    return join_kv_types(types[0] if k is None else k, types[1] if v is None else v)


def requested_kv_type(kv_type: str | None, k: str | None, v: str | None) -> str | None:
    """`with_kv_parts` for flags without a default: None if none was given, f16 for the part that --kv-k or --kv-v leaves open."""
    return None if kv_type is k is v is None else with_kv_parts("f16" if kv_type is None else kv_type, k, v)


def undivided_key(file: GGUFFile, kv_type: str) -> int | None:
    """The floats of one head's key, if they are no whole number of blocks of K's quantized type; else None.

    llama.cpp checks this for flash attention only (llama-context.cpp, llama_init_from_model). Its plain attention would compute
    something else.
    """
    if kv_types(kv_type)[0] in UNQUANTIZED:
        return None
    heads = max(file.numbers("attention.head_count", file.required_int("block_count")), default=0)
    default = int(file.number("embedding_length", 0) or 0) // int(heads) if heads else 0
    width = file.number("attention.key_length", default)
    widths = (file.number(f"attention.key_length{which}", width) for which in ("", "_swa", "_mla"))
    return next((int(w) for w in widths if w and w % BLOCK), None)


def has_plain_cache(file: GGUFFile) -> bool:
    """Whether the cache holds one key and one value for every position in every layer, so that its size has a closed form."""
    return file.architecture in PLAIN_CACHE


def kv_bytes(file: GGUFFile, n_ctx: int, kv_type: str) -> int | None:
    """Bytes of the KV cache for `n_ctx` tokens; None if the architecture's cache may have another form than `has_plain_cache`.

    This is the closed form; `yarn_edge.memory.plan` asks llama.cpp, for every architecture and for everything else that a
    context takes.
    """
    if not has_plain_cache(file):
        return None
    heads = file.required_int("attention.head_count")
    kv_heads = int(file.number("attention.head_count_kv", heads) or heads)
    default = file.required_int("embedding_length") // heads
    row = sum(
        int(file.number(f"attention.{part}_length", default) or 0) * KV_TYPES[kind][1]
        for part, kind in zip(("key", "value"), kv_types(kv_type), strict=True)
    )
    return int(file.required_int("block_count") * kv_heads * row * n_ctx)


def check_plain(file: GGUFFile, kv_type: str) -> None:
    """Raise YarnEdgeError if plain attention cannot have a cache of this type."""
    v_type, width = kv_types(kv_type)[1], undivided_key(file, kv_type)
    if v_type not in UNQUANTIZED:
        raise YarnEdgeError(
            f"{file.path}: plain attention needs V in one of {', '.join(UNQUANTIZED)}, not in {v_type}: choose another attention, "
            "or another type with --kv-v"
        )
    if width is not None:
        raise YarnEdgeError(
            f"{file.path}: a cache of type {kv_type} has blocks of {BLOCK}, which do not divide keys of {width} floats: choose "
            "another type with --kv-k"
        )


def check_room(file: GGUFFile, n_ctx: int, kv_type: str) -> None:
    """Raise YarnEdgeError if the KV cache for `n_ctx` tokens alone is larger than the free memory.

    A system that overcommits memory would end the process while the cache is filled. This is the last guard before the
    allocation, not a prediction: `yarn_edge.memory` has that.
    """
    needed, free = kv_bytes(file, n_ctx, kv_type), available_bytes()
    if needed is not None and needed > free:
        raise YarnEdgeError(
            f"{file.path}: a context of {n_ctx} tokens with a cache of type {kv_type} needs {needed / 2**30:.1f} GiB, but only "
            f"{free / 2**30:.1f} GiB are free: choose a smaller context or cache type"
        )
