"""The vocabularies of a GGUF that llama.cpp asserts, or with which its tokenizers never end: one row per `tokenizer.ggml.model`.

Source: llama-vocab.cpp of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

from dataclasses import dataclass

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile

_MODEL, _PRE, _TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"
MAX_TOKENS = (
    2**21
)  # llama.cpp takes some 200 bytes for each, however short; the largest known vocabulary has 0.9 million
_BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class End:
    """A token that is put before or after every text. default: its id if the file names none, None for no token.

    asserted: llama.cpp asserts that there is one, unless the key `tokenizer.ggml.add_…_token` is false; "always": even then.
    """

    default: int | None
    asserted: str = "unless off"  # or "if on", "always", "never"


@dataclass(frozen=True)
class TokenizerRow:
    """A value of `tokenizer.ggml.model`. refused: why no model with it can be run; "" for those that can."""

    bos: End = End(None, "never")
    eos: End = End(None, "never")
    refused: str = ""
    needs_bytes: bool = False  # every byte token: <0x00> to <0xFF>


_NO_VOCABULARY = TokenizerRow(refused="the file has no vocabulary to tokenize with")
BYTE_PAIRS = TokenizerRow(End(11), End(11, "if on"))
TOKENIZERS: dict[str, TokenizerRow] = {
    "llama": TokenizerRow(End(1), End(2, "if on"), needs_bytes=True),
    "gpt2": BYTE_PAIRS,
    "hybriddna": BYTE_PAIRS,
    "whitespace": BYTE_PAIRS,
    "gemma4": TokenizerRow(End(None, "always"), End(None, "if on")),
    "t5": TokenizerRow(End(None, "if on"), End(1)),
    "plamo2": TokenizerRow(),
    "test": TokenizerRow(),
    "none": _NO_VOCABULARY,
    "no_vocab": _NO_VOCABULARY,
    # Models with these never get as far: llama.cpp crashes on tokens that WordPiece lacks, RWKV's have no attention heads.
    "bert": TokenizerRow(refused="a WordPiece vocabulary is that of an embedding model, which writes no text"),
    "rwkv": TokenizerRow(refused="llama.cpp never ends on a text of which the vocabulary has no token"),
}
# Pre-tokenizers that leave spaces in words, although llama.cpp asserts that no pair to merge has one.
SPACED_PRE = {"whitespace": "llama.cpp cannot tokenize two spaces with it; it is that of an embedding model"}


def check_vocabulary(file: GGUFFile) -> None:
    """Raise YarnEdgeError, with the key, for a vocabulary that would end the process or never end."""
    model, pre = file.metadata.get(_MODEL), file.metadata.get(_PRE)
    for key, value in ((_MODEL, model), (_PRE, pre)):
        if value is not None and not isinstance(value, str):
            raise file.wrong(key, "expected a name")
    tokenizer = TokenizerRow() if model is None else TOKENIZERS.get(model)
    if tokenizer is None:
        raise file.wrong(_MODEL, f"llama.cpp knows {', '.join(n for n, row in TOKENIZERS.items() if not row.refused)}")
    if tokenizer.refused:
        raise file.wrong(_MODEL, tokenizer.refused)
    if model == "gpt2" and pre in SPACED_PRE:
        raise file.wrong(_PRE, SPACED_PRE[pre])
    tokens = file.metadata.get(_TOKENS)
    if isinstance(tokens, list):
        _check_tokens(file, tokens, tokenizer)


def _check_tokens(file: GGUFFile, tokens: list[str], tokenizer: TokenizerRow) -> None:
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise file.wrong(_TOKENS, f"expected 1 to {MAX_TOKENS}")
    # llama.cpp reads them up to a NUL and renames empty ones, so several may be empty.
    named = {t.split("\0", 1)[0] or f"[EMPTY_{i}]" for i, t in enumerate(tokens)}
    if len(named) != len(tokens):
        raise YarnEdgeError(f"{file.path}: {_TOKENS} has the same token twice")
    if tokenizer.needs_bytes and not named >= _BYTE_TOKENS:
        missing = min(_BYTE_TOKENS - named)
        raise YarnEdgeError(f"{file.path}: {_TOKENS} has no {missing}, which a SentencePiece vocabulary needs")
    for name, end in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        _check_end(file, name, end, len(tokens))


def _check_end(file: GGUFFile, name: str, end: End, n_tokens: int) -> None:
    """llama.cpp ignores an id outside the vocabulary, and the default one too."""
    switch = file.metadata.get(f"tokenizer.ggml.add_{name}_token")
    if {"always": False, "never": True, "if on": switch is not True, "unless off": switch is False}[end.asserted]:
        return
    key = f"tokenizer.ggml.{name}_token_id"
    if not any(isinstance(i, int) and 0 <= i < n_tokens for i in (file.metadata.get(key), end.default)):
        raise file.wrong(key, f"llama.cpp adds that token to texts, and the vocabulary has {n_tokens}")
