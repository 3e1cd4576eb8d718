"""Mistral's tekken.json as the contents of a tokenizer.json: byte-level BPE, whose ranks become merges.

Source: mistral-common, tokens/tokenizers/tekken.py. Special tokens have the first ids, ordinary ones follow in the order of
their ranks. The encoder joins the neighbors whose union has the lowest rank, so every pair of tokens that makes a token is a merge.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.config_file import ConfigFile, read_json, shown

TEKKEN = "tekken.json"
NO_TEMPLATE = (
    f"there is no chat template: {TEKKEN} has none, and no chat_template.jinja lies beside it; take one from the model's repository, "
    "or the file only continues text"
)
# Files before version 11 do not list the special tokens; they have these, and <SPECIAL_20> and so on.
_SPECIAL_TEXT = """<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS]
    [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"""
_SPECIAL = tuple(_SPECIAL_TEXT.split())
MAX_SPECIAL, MAX_TOKEN_BYTES = 100_000, 1024  # published files have 1000, and 78 bytes
# Every cut of every token is looked up, and joined pairs are written out: both grow with the sum of the squared lengths.
MAX_SQUARED_BYTES = 1 << 26  # tekken_240911.json has 8.7 million in 150,000 tokens
NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for the 256 bytes: printable Latin-1 maps to itself, the others to U+0100 and up."""
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


def tekken_settings(path: Path) -> dict[str, Any]:
    """What a tokenizer.json with the same tokens would hold. BOS comes before texts, as mistral-common puts it.

    Raises YarnEdgeError, with the key, for a file that is not of this format.
    """
    file = ConfigFile(str(path), read_json(path))
    config = file.section("config")
    if config is None:
        raise file.error("config", "is missing: download the file again")
    size, n_special = (config.required_integer(k) for k in ("default_vocab_size", "default_num_special_tokens"))
    special = _special_tokens(file, n_special)
    pattern = config.values.get("pattern")
    if not isinstance(pattern, str):
        raise config.error("pattern", f"is {shown(pattern)}, not text: download the file again")
    tokens = _tokens(file, size - n_special)
    character = {byte: c for c, byte in byte_alphabet().items()}
    texts = ["".join(character[byte] for byte in token) for token in tokens]
    vocab = {text: index for index, (text, _control) in enumerate(special)}
    vocab |= {text: n_special + rank for rank, text in enumerate(texts)}
    if len(vocab) != size:
        raise file.error("vocab", f"and special_tokens have {len(vocab)} different tokens, expected {size}")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    one, bos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": NAMES["bos_token"], "type_id": 0}}
    return {
        "added_tokens": [
            {"id": i, "content": text, "special": control, **flags} for i, (text, control) in enumerate(special)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, plain]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, one],
            "pair": [bos, one, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                NAMES["bos_token"]: {
                    "id": NAMES["bos_token"],
                    "ids": [vocab[NAMES["bos_token"]]],
                    "tokens": [NAMES["bos_token"]],
                }
            },
        },
        "decoder": plain,
        "model": {"type": "BPE", "vocab": vocab, "merges": _merges(texts), "ignore_merges": True},
    }


def _special_tokens(file: ConfigFile, count: int) -> list[tuple[str, bool]]:
    """(text, whether it is a control token) by id."""
    if count > MAX_SPECIAL:
        raise file.error("config.default_num_special_tokens", f"is {count}, more than {MAX_SPECIAL}")
    listed = file.values.get("special_tokens")
    if listed is None:
        listed = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(_SPECIAL)]
    if not isinstance(listed, list) or len(listed) > count:
        raise file.error("special_tokens", f"is not a list of at most {count} tokens")
    found = [(f"<SPECIAL_{index}>", True) for index in range(count)]
    for index, token in enumerate(listed):
        if not isinstance(token, dict) or token.get("rank") != index or not isinstance(token.get("token_str"), str):
            raise file.error(f"special_tokens[{index}]", f"is {shown(token)}, expected rank {index} and token_str")
        if not 0 < len(token["token_str"]) <= MAX_TOKEN_BYTES:
            raise file.error(
                f"special_tokens[{index}].token_str",
                f"has {len(token['token_str'])} characters, expected 1 to {MAX_TOKEN_BYTES}",
            )
        found[index] = token["token_str"], bool(token.get("is_control", True))
    missing = [text for text in NAMES.values() if (text, True) not in found and text != NAMES["pad_token"]]
    if missing:
        raise file.error("special_tokens", f"does not have {missing[0]}")
    return found


def _tokens(file: ConfigFile, count: int) -> list[bytes]:
    """The bytes of the first `count` ordinary tokens by rank; the first 256 are the bytes themselves."""
    listed = file.values.get("vocab")
    if not isinstance(listed, list) or not 256 <= count <= len(listed):
        raise file.error("vocab", f"is not a list of at least {max(count, 256)} tokens: download the file again")
    found = []
    for rank, token in enumerate(listed[:count]):
        try:
            if token["rank"] != rank:
                raise ValueError
            found.append(base64.b64decode(token["token_bytes"], validate=True))
            if not 0 < len(found[-1]) <= MAX_TOKEN_BYTES:
                raise ValueError
        except (TypeError, KeyError, ValueError, binascii.Error) as error:
            raise file.error(
                f"vocab[{rank}]", f"is {shown(token)}, expected rank {rank} and 1 to {MAX_TOKEN_BYTES} token_bytes"
            ) from error
    if set(found[:256]) != {bytes([byte]) for byte in range(256)}:
        raise file.error("vocab", "does not begin with the 256 bytes")
    squared = sum(len(token) ** 2 for token in found)
    if squared > MAX_SQUARED_BYTES:
        raise file.error(
            "vocab",
            f"has too many long tokens: their squared lengths add up to {squared} bytes, more than {MAX_SQUARED_BYTES} (published files "
            "have 9 million): download the file again",
        )
    return found


def _merges(texts: list[str]) -> list[list[str]]:
    """Every pair of tokens that makes a token, by the rank of that token; of one token by the ranks of the two."""
    ranks = {text: rank for rank, text in enumerate(texts)}
    found = []
    for text in texts:
        cuts = [(text[:at], text[at:]) for at in range(1, len(text))]
        known = [(ranks[left], ranks[right]) for left, right in cuts if left in ranks and right in ranks]
        found += [[texts[left], texts[right]] for left, right in sorted(known)]
    return found
