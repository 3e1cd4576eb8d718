"""Tiny checkpoints with random weights, for shapes and bad input. Their attention is flat, so wrong positions do not show."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

YARN = {
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256},
    "max_position_embeddings": 1024,
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
EXTRA: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 48}}
_TEXT = ["the quick brown fox jumps over the lazy dog", "in the beginning was the word", "1234 five 678"] * 4


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model; `changes` are merged over it; a value of ... removes the key."""
    values = {
        "architectures": [CLASSES[family]],
        "model_type": family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **EXTRA.get(family, {}),
        **YARN,
        **changes,
    }
    return {k: v for k, v in values.items() if v is not ...}


def tensors(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights from transformers' own class, so names and shapes are the library's."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copy.deepcopy(values))
    ).eval()
    state = {
        n: (torch.randn_like(v) * 0.05 + (1 if "norm" in n else 0)).to(dtype) for n, v in model.state_dict().items()
    }
    if values["tie_word_embeddings"]:
        del state["lm_head.weight"]
    return state


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer like GPT-2's, smaller than the tiny models' 320 embeddings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_checkpoint(
    folder: Path, family: str = "llama", *, form: str = "single", dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A tiny checkpoint. form: single, shards, bin, bin-shards."""
    folder.mkdir(parents=True, exist_ok=True)
    values = config(family, **changes)
    (folder / "config.json").write_text(json.dumps(values))
    write_tokenizer(folder)
    write_weights(folder, tensors(values, dtype), form)
    return folder


def write_weights(folder: Path, state: dict[str, torch.Tensor], form: str = "single") -> None:
    """Write the weights as one file or two, in safetensors' or torch's format."""
    suffix = "bin" if form.startswith("bin") else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        if suffix == "bin":
            torch.save(part, path)
        else:
            save_file(part, path, {"format": "pt"})

    if not form.endswith("shards"):
        save(state, folder / f"{stem}.{suffix}")
        return
    names = sorted(state)
    homes = {n: f"{stem}-0000{1 + (i >= len(names) // 2)}-of-00002.{suffix}" for i, n in enumerate(names)}
    for file in sorted(set(homes.values())):
        save({n: state[n] for n in names if homes[n] == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
