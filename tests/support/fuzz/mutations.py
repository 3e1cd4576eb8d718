"""Seeds (small GGUFs of every form, configs of every dialect) and their mutations."""

from __future__ import annotations

import copy
import json
import math
import random
import struct
from pathlib import Path
from typing import Any

from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.flags import PlannerOptions
from yarn_edge.gguf.file import GGUFFile

from support import tiny

EXTREMES = (0, 1, 2, 3, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    4,
    0.5,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    10**400,
    2**63,
    "",
    "yarn",
    "4",
    "x" * 10000,
    [],
    [1],
    [[[]]],
    {},
    {"factor": 4},
    [1e308] * 64,
    {"a": {"b": {}}},
    "\u0000\u001b[31m",
    "longrope",
    "llama3",
    "dynamic",
)


def mutate_bytes(rng: random.Random, data: bytes, head: int) -> bytes:
    """One to four changes, most of them in the first `head` bytes, where the structure is."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(max(1, min(head, len(out)) if rng.random() < 0.9 else len(out)))
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", rng.choice(EXTREMES))
        elif kind == 2:
            out[at : at + 4] = struct.pack("<I", rng.choice(EXTREMES) & 0xFFFFFFFF)
        elif kind == 3:
            del out[at:]
        elif kind == 4:
            del out[at : at + rng.randint(1, 64)]
        elif kind == 5:
            out[at:at] = rng.randbytes(rng.randint(1, 32))
        else:
            out[at : at + 4] = struct.pack("<f", rng.choice((math.nan, math.inf, -1.0, 0.0, 1e30, 1e-30)))
    return bytes(out)


_FIRST = ("rope", "context", "head", "length", "count", "split", "alignment", "architecture", "file_type")


def mutate_value(rng: random.Random, data: bytes, header: GGUFFile) -> bytes:
    """One to three values of keys overwritten in place, most of them in keys that positions are read from."""
    out = bytearray(data)
    keys = list(header.entries)
    chosen = [k for k in keys if any(word in k for word in _FIRST)]
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(chosen if rng.random() < 0.9 else keys)
        entry = header.entries[key]
        at = entry.start + 8 + len(key.encode()) + (0 if rng.random() < 0.1 else 4)  # sometimes the type itself
        width = max(1, min(8, entry.end - at))
        fresh = rng.choice(
            (
                struct.pack("<Q", rng.choice(EXTREMES)),
                struct.pack("<f", rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 0.5, 3.0, 1e30, 1e-30))) * 2,
                struct.pack("<d", rng.choice((math.nan, math.inf, -1.0, 0.0, 0.5, 8.0, 1e300, 1e-300))),
                rng.randbytes(8),
            )
        )
        out[at : at + width] = fresh[:width]
    return bytes(out)


def mutate_json(rng: random.Random, values: Any) -> Any:
    """One to three values replaced, removed or moved, anywhere in the tree."""
    tree = json.loads(json.dumps(values))
    for _ in range(rng.randint(1, 3)):
        node, keys = tree, list(tree)
        while keys and rng.random() < 0.6 and any(isinstance(node[k], dict) for k in keys):
            node = node[rng.choice([k for k in keys if isinstance(node[k], dict)])]
            keys = list(node)
        if keys and rng.random() < 0.25:
            del node[rng.choice(keys)]
        elif keys and rng.random() < 0.2:
            place = rng.choice(("rope_scaling", "rope_parameters", "factor", "type", "yarn", "text_config"))
            node[place] = json.loads(json.dumps(node[rng.choice(keys)]))  # a copy: it may hold the place itself
        else:
            node[rng.choice(keys or ["factor"])] = copy.deepcopy(rng.choice(VALUES))
    return tree


OWN = {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.35}
# family, further keys of the YaRN block, options of convert
GGUF_SEEDS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("llama", {}, {}),
    ("llama", OWN, {}),
    ("llama", OWN, {"planner": PlannerOptions("never")}),
    ("qwen2", OWN, {}),
    ("qwen3", {"attention_factor": 1.2}, {}),
)


def gguf_seeds(folder: Path) -> list[bytes]:
    """Small GGUFs in the native, baked and arguments forms, made by convert."""
    found = []
    for i, (family, block, options) in enumerate(GGUF_SEEDS):
        scaling = {**tiny.YARN["rope_scaling"], **block}
        checkpoint = tiny.write_checkpoint(folder / f"ck{i}", family, rope_scaling=scaling)
        found.append(convert(checkpoint, str(folder / f"{i}.gguf"), "F32", **options)[0].read_bytes())
    return found


_FAMILIES = tuple(
    {"model_type": kind, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 16384, "rope_theta": 1e4, **more}
    for kind, more in (
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "finetuned": True}}),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 8, "beta_slow": 2,
                                       "original_max_position_embeddings": 4096, "attention_factor": 1.3, "truncate": False}}),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 4096}}),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                  "original_max_position_embeddings": 4096}),
        ("deepseek_v3", {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "rope_scaling": {"type": "yarn", "factor": 4.0,
                         "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}}),
        ("gpt_oss", {"head_dim": 16, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
                     "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False,
                                      "original_max_position_embeddings": 4096}}),
        ("olmo3", {"rope_theta": 5e5, "layer_types": ["sliding_attention", "full_attention"], "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                   "original_max_position_embeddings": 4096, "attention_factor": 1.2}}),
        ("gemma3_text", {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6,
                         "original_max_position_embeddings": 4096},
                                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        ("ministral3", {"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "mscale": 1.0,
                        "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "llama_4_scaling_beta": 0.1}}),
        ("mistral3", {"rope_theta": None, "text_config": {"model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4,
                                      "max_position_embeddings": 4096}}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
    )
)  # fmt: skip
_PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_heads": 4,
    "head_dim": 16,
    "n_layers": 2,
    "rope_theta": 1e6,
    "max_position_embeddings": 16384,
    "vocab_size": 320,
    "yarn": {"factor": 4, "original_max_position_embeddings": 4096, "beta": 32, "alpha": 1, "apply_scale": True},
}
CONFIGS: tuple[dict[str, Any], ...] = (*_FAMILIES, _PARAMS)
