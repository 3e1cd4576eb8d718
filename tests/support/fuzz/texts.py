"""Texts of long runs and much markup, tokenized under every pre-tokenizer of llama.cpp."""

from __future__ import annotations

import random
import time
from pathlib import Path

from yarn_edge.runtime.model import Model

from support.fuzz.runner import Case
from support.vocabularies import BPE, PRE_TOKENIZERS, SPM, write_vocabulary

RUNS = [*"-aA1\n\t\r一дが가は😀\u0301\xa0\u3000\x00\x01'！/ǅ▁\ufffd\u200b\u202e\U0010ffff "]
MARKUP = ["<s>", "</s>", "<u>", "<tool>", "<s", "<|im_end|>", "\udc80", "<0x0A>"]


class Texts:
    """Texts of up to 200,000 characters. The process must live, and ids must be of the vocabulary."""

    name, in_process = "texts", False

    def __init__(self, scratch: Path) -> None:
        rows = [BPE | {"tokenizer.ggml.pre": pre} for pre in PRE_TOKENIZERS]
        rows += [SPM | {"tokenizer.ggml.add_space_prefix": prefix} for prefix in (True, False)]
        self.paths = [write_vocabulary(scratch / f"vocabulary-{i}.gguf", keys) for i, keys in enumerate(rows)]
        self._models: dict[int, Model] = {}

    def case(self, rng: random.Random, _scratch: Path) -> Case:
        which, text = rng.randrange(len(self.paths)), _text(rng)
        add_special, parse_special = rng.random() < 0.2, rng.random() < 0.5
        if which not in self._models:
            self._models[which] = Model(self.paths[which], vocab_only=True)
        model = self._models[which]

        def tokenize() -> str:
            ids = model.tokenize(
                text, add_special=add_special, parse_special=parse_special, until=time.monotonic() + 2.0
            )
            assert not ids or 0 <= min(ids) <= max(ids) < model.n_vocab
            return "tokenized"

        return Case(4 * len(text), tokenize)


def _text(rng: random.Random) -> str:
    parts = []
    left = int(10 ** rng.uniform(0, 5.3))
    while left > 0:
        length = min(left, int(10 ** rng.uniform(0, 5.3)))
        source = rng.choice((RUNS, RUNS, MARKUP))
        words = [rng.choice(source)] if rng.random() < 0.7 else rng.choices([*RUNS, *MARKUP], k=20)
        parts.append(("".join(words) * length)[:length])
        left -= length
    return "".join(parts)
