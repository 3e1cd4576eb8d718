"""Vocabularies without weights, for tests of texts: byte-level BPE under every pre-tokenizer, and SentencePiece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.gguf_files import BYTE_TOKENIZER, write_gguf

# One name for each of llama.cpp's BPE pre-tokenizers, by whether it is matched with std::regex.
REGEX = [
    "afmoe",
    "bailingmoe",
    "bloom",
    "deepseek-coder",
    "deepseek-llm",
    "deepseek-v3",
    "exaone-moe",
    "falcon",
    "gpt-4o",
    "gpt3-finnish",
    "granite-embed-multi-97m",
    "hunyuan-dense",
    "hy_v4",
    "jais-2",
    "joyai-llm",
    "minicpm5",
    "minimax-m2",
    "poro-chat",
    "seed-coder",
    "spark2_5",
    "superbpe",
    "tekken",
    "tiny_aya",
    "ufakzeka",
    "viking",
    "youtu",
]
BY_HAND = [
    "chameleon",
    "chatglm-bpe",
    "codeshell",
    "command-r",
    "dbrx",
    "default",
    "exaone",
    "gemma4",
    "gpt-2",
    "granite-docling",
    "grok-2",
    "hunyuan",
    "jais",
    "kimi-k2",
    "laguna",
    "llama3",
    "mellum2",
    "minerva-7b",
    "mpt",
    "olmo",
    "qwen2",
    "qwen35",
    "refact",
    "sarvam-moe",
    "smaug-bpe",
    "smollm",
    "solar-open",
    "stablelm2",
    "starcoder",
    "trillion",
]
PRE_TOKENIZERS = [*REGEX, *BY_HAND]
MERGES = ["Ċ Ċ", "Ġ Ġ", "t h", "th e", "Ġ a", ". Ċ"]
BPE = {
    **BYTE_TOKENIZER,
    "tokenizer.ggml.tokens": [
        *BYTE_TOKENIZER["tokenizer.ggml.tokens"],
        "<tool>",
        *(m.replace(" ", "") for m in MERGES),
    ],
    "tokenizer.ggml.token_type": [*BYTE_TOKENIZER["tokenizer.ggml.token_type"], 4, *[1] * len(MERGES)],
    "tokenizer.ggml.merges": [*BYTE_TOKENIZER["tokenizer.ggml.merges"], *MERGES],
}
SPM_WORDS = ["▁", "a", "b", "c", "t", "h", "e", "▁a", "▁the", "th", "the", "▁▁", "ab", "\n", "\n\n", ".", "word"]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *SPM_WORDS, "<tool>"],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(SPM_WORDS), 4],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, *[0.0] * 256, *(-float(i) for i in range(len(SPM_WORDS))), 0.0],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def write_vocabulary(path: Path, keys: dict[str, Any]) -> Path:
    """A file without tensors, loadable with `Model(path, vocab_only=True)`. Returns `path`."""
    return write_gguf(path, "llama", {"llama.block_count": 0, **keys})
