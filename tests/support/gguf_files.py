"""Well-formed GGUFs, written by gguf-py. `gguf_bytes` packs what no writer produces."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFValueType

_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def byte_words() -> list[str]:
    """GPT-2's 256 byte characters in the order of the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b if b in plain else 256 + others.index(b)) for b in range(256)]


# 256 bytes, two merges, then four control tokens.
BYTE_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*byte_words(), "ab", "abc", "<s>", "</s>", "<u>", "<v>"],
    "tokenizer.ggml.token_type": [1] * 258 + [3] * 4,
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 258,
    "tokenizer.ggml.eos_token_id": 259,
}


def write_gguf(
    path: Path,
    architecture: str,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    kinds: Mapping[str, GGUFValueType] | None = None,
    raw_types: Mapping[str, GGMLQuantizationType] | None = None,
    alignment: int | None = None,
) -> Path:
    """A file of these keys (full names) and tensors (NumPy's order of dimensions). Returns `path`.

    A value's Python type decides its GGUF type: int is uint32, float is float32, a list is an array of the type gguf-py infers.
    `kinds` overrides it, for a list the type of its elements. raw_types: the types of tensors given as quantized bytes.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (keys or {}).items():
        kind = (kinds or {}).get(key)
        if not isinstance(value, list):
            writer.add_key_value(key, value, kind or _KINDS[type(value)])
        elif kind:
            writer.add_key_value(key, value, GGUFValueType.ARRAY, sub_type=kind)
        else:
            writer.add_array(key, value)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values, raw_dtype=(raw_types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, scale: float = 0.05
) -> dict[str, npt.NDArray[np.float32]]:
    """Normally distributed weights by name; norms are around 1."""
    random = np.random.default_rng(seed)
    drawn = {name: random.standard_normal(shape, dtype=np.float32) * scale for name, shape in shapes.items()}
    return {name: (values + ("norm.w" in name)).astype(np.float32) for name, values in drawn.items()}


def split(source: Path, target: Path, max_tensors: int, **options: Any) -> list[Path]:
    """`source` as shards TARGET-00001-of-0000N.gguf of at most `max_tensors` tensors."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama", split_max_tensors=max_tensors, **options)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for t in reader.tensors:
        writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}-*-of-*.gguf"))
