"""A checkpoint's tokenizer as GGUF metadata: tokens, merges, special tokens and the chat template.

Its pre-tokenizer is only a guess here; `vocab_proof.prove` finds the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from yarn_edge.checkpoint.chat_template import chat_template
from yarn_edge.checkpoint.config_file import read_json_if_there
from yarn_edge.checkpoint.ends import end_ids
from yarn_edge.checkpoint.sentencepiece_model import SentencePieceReference
from yarn_edge.checkpoint.tekken import NO_TEMPLATE, TEKKEN
from yarn_edge.checkpoint.token_rows import check_token_rows
from yarn_edge.checkpoint.tokenizer import SPACE, Reference, TokenizersReference, steps
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.header import pack_key
from yarn_edge.llama_rules.ends import token_names
from yarn_edge.llama_rules.template_tokens import UNNAMED, roles_read
from yarn_edge.runtime.text_pieces import MAX_PIECE
from yarn_edge.verify.tokenizer import reference_encoder

from .pretokenizers import pretokenizer_candidates, signature

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.h: enum llama_token_type
_ID_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
_NO_SCORE = -1e9  # for tokens that no merge makes


class _Parts(NamedTuple):
    """The fields of Vocabulary that the two sources fill in different ways."""

    model: str
    pre: str
    scores: list[float] | None
    token_types: list[int]
    merges: list[str] | None
    add_space_prefix: bool | None


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says about its tokenizer. model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).

    special_ids: by "bos", "eos", "unk", "pad". ends: the ids at which an answer ends; end_keys: the keys for those that llama.cpp
    would miss (`vocab_proof`). unnamed: those of "bos" and "eos" that the tokenizer has no token for. notes: known differences
    between llama.cpp and the checkpoint.
    """

    model: str
    pre: str
    tokens: list[str]
    scores: list[float] | None
    token_types: list[int]
    merges: list[str] | None
    special_ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str | None
    notes: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    end_keys: Mapping[str, Any] = field(default_factory=dict)
    unnamed: tuple[str, ...] = ()
    _packed: dict[str, tuple[Any, bytes]] = field(default_factory=dict, compare=False, repr=False)

    def keys(self) -> dict[str, Any]:
        """GGUF key -> value, in writing order: int is uint32, list[int] an int32 array, list[float] a float32 array."""
        values: dict[str, Any] = {
            "model": self.model,
            "pre": self.pre,
            "tokens": self.tokens,
            "scores": self.scores,
            "token_type": self.token_types,
            "merges": self.merges,
            **{key: self.special_ids.get(name) for name, key in _ID_KEYS.items()},
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "add_space_prefix": self.add_space_prefix,
        }
        keys = {f"tokenizer.ggml.{name}": value for name, value in values.items() if value is not None}
        template = {} if self.chat_template is None else {"tokenizer.chat_template": self.chat_template}
        unnamed = [role for role in roles_read(self.chat_template) if role in self.unnamed]
        return {**keys, **self.end_keys, **({UNNAMED: unnamed} if unnamed else {}), **template}

    def entries(self) -> dict[str, bytes]:
        """`keys`, packed. Lists are packed once, also for a copy with another `pre`."""
        made = {}
        for key, value in self.keys().items():
            known = self._packed.get(key)
            if known is None or known[0] is not value:
                known = self._packed[key] = value, pack_key(key, value)
            made[key] = known[1]
        return made


def read_vocabulary(
    checkpoint: Path, vocab_size: int, reference: TokenizersReference | SentencePieceReference | None = None
) -> Vocabulary:
    """The tokenizer in a checkpoint folder, padded with unused tokens to `vocab_size`, the number of embedding rows.

    Reads tokenizer.json if there is one (the others are then ignored, as in transformers), else tekken.json, else tokenizer.model.
    reference: the result of `reference_encoder`, if at hand. `pre` is a guess until `prove`. Raises YarnEdgeError for a tokenizer
    that llama.cpp cannot represent.
    """
    reference = reference or reference_encoder(checkpoint)
    tokens = _tokens(reference, vocab_size)
    if isinstance(reference, SentencePieceReference):
        parts = _from_sentencepiece(reference, tokens)
    else:
        parts = _from_tokenizer_json(reference, tokens)
    types = parts.token_types
    for index, markup in reference.markup.items():
        types[index] = CONTROL if markup.special else USER_DEFINED
    ends = end_ids(checkpoint, reference, len(tokens))
    ids = _special_ids(checkpoint, reference, len(tokens)) | ({"eos": ends[0]} if ends else {})
    if "unk" in ids and parts.model == "llama":
        types[ids["unk"]] = UNKNOWN
    prefix, suffix = reference.added_around()
    notes = [*reference.notes]
    for name, added in (("bos", prefix), ("eos", suffix)):
        if added and ids.get(name) != added[0]:
            notes.append(f"the tokenizer adds {tokens[added[0]]!r}, which is written as {name.upper()}")
            ids[name] = added[0]
    if "eos" not in ids:
        raise YarnEdgeError(
            f"{reference.source.parent / 'tokenizer_config.json'}: eos_token is missing: add it, or llama.cpp ends answers at an "
            "arbitrary token"
        )
    _check(reference.source, tokens, parts.model)
    template = chat_template(reference.source.parent, reference.config)
    if template is None and reference.source.name == TEKKEN:
        notes.append(NO_TEMPLATE)
    notes += [
        f"the chat template writes {role}_token, which the tokenizer does not name: yarn-edge writes nothing there, other "
        f"programs may write {token_names(tokens, [ids[role]]) if role in ids else 'any token'}"
        for role in roles_read(template)
        if role in reference.unnamed
    ]
    return Vocabulary(
        **parts._asdict(),
        tokens=tokens,
        special_ids=ids,
        add_bos=bool(prefix),
        add_eos=bool(suffix),
        chat_template=template,
        notes=tuple(notes),
        ends=ends,
        unnamed=reference.unnamed,
    )


def _tokens(reference: Reference, vocab_size: int) -> list[str]:
    """Texts by id; ids without a token, below vocab_size, become `[PAD7]` and so on."""
    check_token_rows(reference.source, reference.vocabulary, vocab_size)
    tokens: list[str | None] = [None] * vocab_size
    for text, index in reference.vocabulary.items():
        if tokens[index] is not None:
            raise YarnEdgeError(
                f"{reference.source}: id {index} is both {one_line(repr(tokens[index]), 40)} and {one_line(repr(text), 40)}: "
                "each token needs its own id"
            )
        tokens[index] = text
    return [f"[PAD{index}]" if text is None else text for index, text in enumerate(tokens)]


def _from_tokenizer_json(reference: TokenizersReference, tokens: list[str]) -> _Parts:
    model, settings, source = reference.model, reference.settings, reference.source
    pairs = [_pair(source, merge) for merge in model["merges"]]
    types = [NORMAL if text in reference.vocabulary else UNUSED for text in tokens]
    components = [*steps(settings.get("pre_tokenizer")), *steps(settings.get("normalizer"))]
    kinds = {step.get("type") for step in components}
    if "ByteLevel" in kinds:
        for left, right in pairs:
            if " " in left or " " in right:
                raise YarnEdgeError(
                    f"{source}: model.merges joins {one_line(repr(left), 40)} and {one_line(repr(right), 40)}: "
                    "GGUF separates the two pieces by a space, so neither can hold one"
                )
        pre = pretokenizer_candidates(signature(settings, model))[0].name
        merges = [f"{left} {right}" for left, right in pairs]
        return _Parts("gpt2", pre, None, types, merges, None)
    if "Metaspace" in kinds or any(SPACE in str(step.get("content", step.get("prepend"))) for step in components):
        scores = [_NO_SCORE] * len(tokens)
        for rank in range(len(pairs) - 1, -1, -1):  # backwards: the first merge that makes a token decides
            if (index := reference.vocabulary.get("".join(pairs[rank]))) is not None:
                scores[index] = -float(rank)
        for text in reference.vocabulary.keys() & _BYTE_TOKENS:
            types[reference.vocabulary[text]] = BYTE
        prefixed = "".join(reference.tokenizer.encode("a", add_special_tokens=False).tokens).startswith(SPACE)
        return _Parts("llama", "default", scores, types, None, prefixed)
    names = ", ".join(sorted(str(kind) for kind in kinds)) or "nothing"
    raise YarnEdgeError(
        f"{source}: pre_tokenizer and normalizer hold {one_line(names, 100)}: only byte-level BPE (ByteLevel) and "
        "SentencePiece BPE (Metaspace) can be converted"
    )


def _from_sentencepiece(reference: SentencePieceReference, tokens: list[str]) -> _Parts:
    pieces = reference.pieces
    types = [UNUSED] * len(tokens)
    scores = [_NO_SCORE] * len(tokens)
    for index, piece in enumerate(pieces):
        types[index], scores[index] = piece.kind, piece.score
        if piece.kind == USER_DEFINED:  # llama.cpp searches for them in the original text
            tokens[index] = piece.text.replace(SPACE, " ")
    prefixed = "".join(reference.processor.encode("a", out_type=str)).startswith(SPACE)
    return _Parts("llama", "default", scores, types, None, prefixed)


def _pair(source: Path, merge: object) -> tuple[str, str]:
    """A merge, written as "a b" or as ["a", "b"]."""
    if isinstance(merge, str) and merge.count(" ") == 1:
        left, right = merge.split(" ")
        return left, right
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise YarnEdgeError(f"{source}: model.merges holds {one_line(repr(merge), 60)}, expected two pieces")
    return parts[0], parts[1]


def _special_ids(checkpoint: Path, reference: Reference, n_tokens: int) -> dict[str, int]:
    """Ids of BOS, UNK and PAD: the tokenizer's, else those in generation_config.json or config.json."""
    ids = {name: index for name, index in reference.ids.items() if name != "eos"}
    fallbacks = [read_json_if_there(checkpoint / name) for name in ("generation_config.json", "config.json")]
    fallbacks += [text for config in fallbacks if isinstance(text := config.get("text_config"), dict)]
    for name in [name for name in _ID_KEYS if name != "eos" and name not in ids]:
        for config in fallbacks:
            value = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and value >= 0 and value not in reference.left_out.values():
                if value >= n_tokens:
                    raise YarnEdgeError(
                        f"{checkpoint}: {name}_token_id is {value}, but the vocabulary has {n_tokens} tokens: "
                        "correct config.json"
                    )
                ids[name] = value
                break
    return ids


def _check(source: Path, tokens: list[str], model: str) -> None:
    """Raise YarnEdgeError for a vocabulary on which llama.cpp would call abort(), or whose tokens are too long to be proved."""
    seen: set[str] = set()
    for index, text in enumerate(tokens):
        if len(text) > MAX_PIECE:
            raise YarnEdgeError(
                f"{source}: token {one_line(repr(text), 60)} (id {index}) has {len(text)} characters, more than {MAX_PIECE}: no text "
                "could hold it"
            )
        if text in seen or "\0" in text:
            what = "holds a NUL byte" if "\0" in text else "appears twice"
            raise YarnEdgeError(
                f"{source}: token {one_line(repr(text), 60)} (id {index}) {what}: "
                "llama.cpp cannot load such a vocabulary"
            )
        seen.add(text)
    if model == "llama" and (missing := [text for text in _BYTE_TOKENS if text not in seen]):
        raise YarnEdgeError(
            f"{source}: has no token {missing[0]}: llama.cpp needs byte fallback (256 tokens, <0x00> to <0xFF>)"
        )
