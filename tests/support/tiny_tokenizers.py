"""Tokenizers trained on the spot by `tokenizers` and `sentencepiece`, for the vocabulary tests."""

from __future__ import annotations

import argparse
import functools
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, trainers
from tokenizers import pre_tokenizers as pre

SIZE = 1200  # rows of the embedding: the trained vocabularies have some tokens less
CORPUS = [
    line
    for i in range(60)
    for line in (
        f"The year {1900 + i} had {i * 37} days, and we'll say it's {i}{i + 1}{i + 2}.",
        "def main():\n    return [x for x in range(10)]\n\n\n    # they're IT'S SHE'LL done",
        "CamelCase XMLParser HTTPServer isn't  two   spaces\tand tabs 123456 2024 99",
        "Привет мир, Καλημέρα κόσμε, schöne Grüße, 今天天气很好, नमस्ते दुनिया 😀😀",
    )
] + Path(argparse.__file__).read_text(encoding="utf-8").splitlines()[:600]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HAN = r"&&[^\p{Han}]]"
_UPPER, _LOWER, _ENDING = UPPER[:-1] + _HAN, LOWER[:-1] + _HAN, "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre.ByteLevel(add_prefix_space=False, use_regex=True)


def split(expression: str) -> Any:
    """A byte-level pre-tokenizer that cuts by one expression."""
    return pre.Sequence([pre.Split(Regex(expression), "isolated"), pre.ByteLevel(False, use_regex=False)])


def with_digits() -> Any:
    """SmolLM's pre-tokenizer."""
    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False, use_regex=True)])


def save(folder: Path, tokenizer: Any, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json in `folder`."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|start|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train(pre_tokenizer: Any, normalizer: Any = None, ignore_merges: bool = False) -> Any:
    """A byte-level BPE with <|start|>, <|end|> and, last, <think>, which is not a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=1100,
        special_tokens=["<|start|>", "<|end|>"],
        show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


@functools.cache
def sentence_model() -> bytes:
    """A SentencePiece BPE of 700 tokens with byte fallback and without normalization."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
        control_symbols=["[INST]"],
        user_defined_symbols=["<tool>"],
        character_coverage=0.99,
    )
    return model.getvalue()
