"""llama.cpp's built-in pre-tokenizers, by their names in `tokenizer.ggml.pre`.

llama.cpp does not read a checkpoint's pre-tokenizer: it runs its own version, chosen by this name. A wrong name loads without
an error and splits words differently. So a row only says where to look first; `vocab_proof.prove` decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yarn_edge.checkpoint.tokenizer import steps


@dataclass(frozen=True)
class Pretokenizer:
    """One name in llama.cpp. marks: texts that are all in the `signature` of such a checkpoint. without: texts that are not."""

    name: str
    marks: tuple[str, ...]
    without: tuple[str, ...] = ()


# Parts of the regular expressions in the checkpoints' tokenizer.json.
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"  # letters, with one other character before them
_MARKED_WORD = r"[\p{L}\p{M}]+"  # letters and combining marks
_CASED_WORD = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"  # uppercase, then lowercase letters
_THREE = r"\p{N}{1,3}"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = "use_regex=True"  # ByteLevel with GPT-2's expression
_DIGIT = "individual_digits=True"
_AT_ONCE = "ignore_merges=True"  # a word that is a token is not built by merges

# Each line ends with the families; after the semicolon, other names that llama.cpp treats the same.
PRETOKENIZERS: tuple[Pretokenizer, ...] = (
    Pretokenizer("smollm", (_DIGIT, _GPT2), ("normalizer=NFC", "type=Punctuation")),  # SmolLM, SmolLM2; mellum2
    Pretokenizer("starcoder", (_DIGIT, _GPT2), ("type=Punctuation",)),  # StarCoder2; codeshell, exaone, minerva-7b
    Pretokenizer("refact", (_DIGIT, _GPT2), ("type=Punctuation",)),  # Refact
    Pretokenizer("command-r", (_DIGIT, _GPT2, "normalizer=NFC")),  # Command R
    Pretokenizer("gpt-2", (_GPT2,), ("type=Digits", "type=Split", "normalizer=NFC")),  # GPT-2, Phi-2; exaone4, mellum
    Pretokenizer("mpt", (_GPT2,), ("type=Digits", "type=Split")),  # MPT
    Pretokenizer("olmo", (_GPT2, "normalizer=NFC"), ("type=Digits", "type=Split")),  # OLMo 1; trillion, jais
    Pretokenizer("llama-bpe", (_WORD, _THREE, _AT_ONCE)),  # Llama 3; falcon3, lfm2, pixtral
    Pretokenizer("dbrx", (_WORD, _THREE), (_AT_ONCE,)),  # DBRX, Phi-4 (cl100k); smaug-bpe, chatglm-bpe
    Pretokenizer("glm4", (_WORD, _THREE, _AT_ONCE)),  # GLM-4
    Pretokenizer("jais-2", (_WORD, _THREE, r"\s{512}(?!\S)")),  # Jais 2
    Pretokenizer("minicpm5", (_WORD, _THREE, r"|\p{N}+|", _AT_ONCE)),  # MiniCPM 5
    Pretokenizer("qwen2", (_WORD, r"|\p{N}|", _CONTRACTION), (_THREE,)),  # Qwen 1.5 to 3; hunyuan, megrez, solar-open
    Pretokenizer("stablelm2", (_WORD, r"|\p{N}|", _CONTRACTION), (_THREE, "normalizer=NFC")),  # StableLM 2
    Pretokenizer("qwen35", (_MARKED_WORD, r"|\p{N}|", _CONTRACTION)),  # Qwen 3.5
    Pretokenizer("seed-coder", (_WORD, r"\p{N}{1}|")),  # Seed-Coder
    Pretokenizer("bailingmoe", (_WORD, r"'(?i:[sdmt]|ll|ve|re)")),  # Ling
    Pretokenizer("ufakzeka", (_WORD, r"|\p{N}|"), ("'s", "(?i:")),  # ufakzeka
    Pretokenizer("laguna", (_WORD, r"[\n]+")),  # Laguna
    Pretokenizer("exaone-moe", (r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",)),  # K-EXAONE
    Pretokenizer("tekken", (_CASED_WORD, r"|\p{N}|"), (_CONTRACTION,)),  # Mistral NeMo, Mistral Small 3
    Pretokenizer("gpt-4o", (_CASED_WORD, _THREE, _CONTRACTION), (_AT_ONCE,)),  # gpt-oss (o200k), Llama 4; kanana2
    Pretokenizer("llama4", (_CASED_WORD, _THREE, _CONTRACTION)),  # Llama 4
    Pretokenizer("minimax-m2", (_CASED_WORD, _THREE, _CONTRACTION), (_AT_ONCE,)),  # MiniMax M2
    Pretokenizer("granite-embed-multi-97m", (_CASED_WORD, _THREE, _AT_ONCE)),  # with marks, and whole words first
    Pretokenizer("tiny_aya", (_CASED_WORD, r"\d{1,3}(?=(?:\d{3})*\b)")),  # Tiny Aya; cohere2moe
    Pretokenizer("kimi-k2", (r"[\p{Han}]+|", r"&&[^\p{Han}]", _THREE)),  # Kimi K2
    Pretokenizer("youtu", (_CASED_WORD, r"|\p{N}|", _CONTRACTION)),  # Youtu
    Pretokenizer("deepseek-llm", (r"\s+$", "[\r\n]", "A-Za-z")),  # DeepSeek LLM, DeepSeek V2
    Pretokenizer("deepseek-coder", (r"\s?\p{L}+", r"\s?\p{P}+")),  # DeepSeek Coder
    Pretokenizer("deepseek-v3", (_MARKED_WORD, _THREE, "[A-Za-z]+|")),  # DeepSeek V3, R1; hunyuan-dense, joyai-llm
    Pretokenizer("spark2_5", (_MARKED_WORD, _THREE, "[A-Za-z]+|")),  # Spark 2.5
    Pretokenizer("afmoe", (_MARKED_WORD, r"\d{1,2}(?=(?:\d{3})+")),  # Trinity
    Pretokenizer("falcon", ("type=Punctuation", _GPT2, "[0-9][0-9][0-9]")),  # Falcon
    Pretokenizer("poro-chat", (" ?[^(\\s|",), ("individual_digits",)),  # Poro, BLOOM; gpt3-finnish
    Pretokenizer("viking", (" ?[^(\\s|", _DIGIT)),  # Viking
    Pretokenizer("superbpe", (r"(?=(\d{3})+(?!\d))",)),  # SuperBPE
)


def signature(settings: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The parts of a tokenizer.json that decide how text is split, one `key=value` per line, for the rows' marks."""
    lines = [f"normalizer={step.get('type')}" for step in steps(settings.get("normalizer"))]
    for step in steps(settings.get("pre_tokenizer")):
        for key, value in step.items():
            lines += [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [f"{key}={value}"]
    lines.append(f"ignore_merges={bool(model.get('ignore_merges'))}")
    return "\n".join(lines)


def pretokenizer_candidates(signature: str) -> list[Pretokenizer]:
    """Every row: first those whose marks fit (most marks first), then the rest in table order."""

    def rank(row: Pretokenizer) -> int:
        fits = all(mark in signature for mark in row.marks) and not any(mark in signature for mark in row.without)
        return -len(row.marks) if fits else 1

    return sorted(PRETOKENIZERS, key=rank)
