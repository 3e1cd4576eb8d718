"""A checkpoint's own tokenizer, as the reference that a GGUF has to equal.

`tokenizer.json` is run by the `tokenizers` library, with the extra special tokens of `tokenizer_config.json` added the way
transformers 5 adds them; without it, `tokenizer.model` is run by `sentencepiece`. Neither needs transformers or torch.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line, os_error

SPACE = "▁"  # how SentencePiece writes a space
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# A second normalizer_spec (field 3) with add_dummy_prefix (field 3) = 0: protobuf merges it into the first.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Markup:
    """A token that is cut out of the text before anything else. strips: it swallows white space, or wants word ends."""

    content: str
    special: bool
    strips: bool


@dataclass(frozen=True)
class Piece:
    """One entry of a SentencePiece model; `kind` counts as in GGUF: 1 normal, 2 unknown, 3 control, … 6 byte."""

    text: str
    score: float
    kind: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, {} if there is no such file. Raises YarnEdgeError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise os_error(error, path) from error
    except UnicodeDecodeError as error:
        raise YarnEdgeError(f"{path}: byte {error.start} is not UTF-8; download the file again") from error
    except (ValueError, RecursionError) as error:
        raise YarnEdgeError(f"{path}: not valid JSON: {one_line(str(error), 200)}; download the file again") from error
    if not isinstance(value, dict):
        raise YarnEdgeError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def token_text(value: object) -> str | None:
    """The text of a token written as "x" or as {"content": "x", …}; None for null and for what is no token."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


class Reference:
    """Calling it with (text, add_special) gives the checkpoint's token ids.

    source: the file it was read from. settings: tokenizer.json without its vocabulary ({} for a SentencePiece model).
    markup: added tokens by id. vocabulary: id by text, added tokens included. pieces: of a SentencePiece model, else None.
    """

    source: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    markup: dict[int, Markup]
    vocabulary: dict[str, int]
    pieces: list[Piece] | None = None

    def __call__(self, text: str, add_special: bool) -> list[int]:
        raise NotImplementedError

    @property
    def prepends_space_once(self) -> bool:
        """True if only the start of the whole text gets a space, not what follows a special token."""
        raise NotImplementedError


class TokenizersReference(Reference):
    """`tokenizer.json`. As in transformers 5, add_bos_token and add_eos_token of tokenizer_config.json do not count."""

    def __init__(self, checkpoint: Path) -> None:
        from tokenizers import Tokenizer

        self.source = checkpoint / "tokenizer.json"
        self.config = tokenizer_config(checkpoint)
        self.settings = read_json(self.source)
        self.model: dict[str, Any] = self.settings.pop("model", None) or {}
        if not isinstance(self.model, dict) or self.model.get("type", "BPE") != "BPE":
            kind = self.model.get("type") if isinstance(self.model, dict) else self.model
            raise YarnEdgeError(f"{self.source}: model.type is {one_line(repr(kind), 60)}; only BPE is supported")
        _check_bpe(self.source, self.model)
        try:
            self.tokenizer = Tokenizer.from_file(str(self.source))
            self._add_tokens()
        except Exception as error:  # the library raises nothing narrower
            raise YarnEdgeError(f"{self.source}: tokenizers refuses it: {one_line(str(error), 200)}") from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.markup = {
            index: Markup(t.content, t.special, bool(t.lstrip or t.rstrip or t.single_word))
            for index, t in self.tokenizer.get_added_tokens_decoder().items()
        }

    def _add_tokens(self) -> None:
        """What transformers adds after loading: added_tokens_decoder in the order of its ids, then the named tokens."""
        from tokenizers import AddedToken

        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        decoder = self.config.get("added_tokens_decoder") or {}
        for _, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            if text := token_text(token):
                self.tokenizer.add_tokens([AddedToken(text, **{k: token[k] for k in flags if k in token})])
        for text in special_texts(self.config):
            self.tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])

    def __call__(self, text: str, add_special: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=add_special).ids)

    @property
    def prepends_space_once(self) -> bool:
        return any(step.get("prepend_scheme") == "first" for step in steps(self.settings.get("pre_tokenizer")))


class SentencePieceReference(Reference):
    """`tokenizer.model`, with added tokens cut out of the text first, and BOS and EOS as tokenizer_config.json says."""

    def __init__(self, checkpoint: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.source = checkpoint / "tokenizer.model"
        self.config = tokenizer_config(checkpoint)
        self.settings = {}
        try:
            data = self.source.read_bytes()
            self.pieces = list(_pieces(self.source, data))
            self.processor = SentencePieceProcessor(model_proto=data)
            self.bare = SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        except OSError as error:
            raise os_error(error, self.source) from error
        except (RuntimeError, ValueError, IndexError, struct.error) as error:
            raise YarnEdgeError(
                f"{self.source}: not a SentencePiece model ({one_line(str(error), 100)}); add the checkpoint's tokenizer.json"
            ) from error
        self.vocabulary = {piece.text: index for index, piece in enumerate(self.pieces)}
        self.markup = {i: Markup(p.text, p.kind != 4, False) for i, p in enumerate(self.pieces) if p.kind in (2, 3, 4)}
        self._read_added(checkpoint)
        ids = {m.content: index for index, m in self.markup.items()}
        self._ids = ids
        longest_first = sorted((text for text in ids if text), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.bos, self.eos = (
            self.vocabulary.get(token_text(self.config.get(name)) or "", index)
            for name, index in (("bos_token", self.processor.bos_id()), ("eos_token", self.processor.eos_id()))
        )

    def _read_added(self, checkpoint: Path) -> None:
        """added_tokens.json and added_tokens_decoder: {"<tool>": 32000} and {"32000": {"content": "<tool>", …}}."""
        special = set(special_texts(self.config))
        for text, index in read_json(checkpoint / "added_tokens.json").items():
            self._add(int(index), Markup(text, text in special, False))
        for key, token in (self.config.get("added_tokens_decoder") or {}).items():
            if text := token_text(token):
                strips = any(token.get(k) for k in ("lstrip", "rstrip", "single_word"))
                self._add(int(key), Markup(text, bool(token.get("special")) or text in special, strips))
        for text in special & self.vocabulary.keys():
            self._add(self.vocabulary[text], Markup(text, True, False))

    def _add(self, index: int, token: Markup) -> None:
        previous = self.vocabulary.setdefault(token.content, index)
        if previous != index:
            raise YarnEdgeError(
                f"{self.source}: the added token {one_line(repr(token.content), 60)} has id {index} and {previous}"
            )
        self.markup[index] = token

    def __call__(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._plain(text, at, match.start())
            ids.append(self._ids[match.group()])
            at = match.end()
        ids += self._plain(text, at, len(text))
        bos = [self.bos] if add_special and self.config.get("add_bos_token") else []
        eos = [self.eos] if add_special and self.config.get("add_eos_token") else []
        return bos + ids + eos

    def _plain(self, text: str, start: int, end: int) -> list[int]:
        if start == end:
            return []
        processor = self.bare if start and self.prepends_space_once else self.processor
        return list(processor.encode(text[start:end]))

    @property
    def prepends_space_once(self) -> bool:
        return not self.config.get("legacy", False)  # transformers 5: legacy=False unless the file says otherwise


def load_reference(checkpoint: Path) -> Reference:
    """The tokenizer of a checkpoint folder. Raises YarnEdgeError if there is none or it is not a BPE."""
    if (checkpoint / "tokenizer.json").exists():
        return TokenizersReference(checkpoint)
    if (checkpoint / "tokenizer.model").exists():
        return SentencePieceReference(checkpoint)
    raise YarnEdgeError(
        f"{checkpoint}: no tokenizer.json and no tokenizer.model; make one with "
        "transformers.AutoTokenizer.from_pretrained(…).save_pretrained(…)"
    )


def tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json where it names no token."""
    config = read_json(checkpoint / "tokenizer_config.json")
    for key, value in read_json(checkpoint / "special_tokens_map.json").items():
        config.setdefault(key, value)
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(str(key).isdecimal() for key in decoder):
        raise YarnEdgeError(f"{checkpoint / 'tokenizer_config.json'}: added_tokens_decoder is not tokens by id")
    return config


def special_texts(config: Mapping[str, Any]) -> list[str]:
    """Texts that tokenizer_config.json declares special: the named tokens, further `*_token` keys, and the lists."""
    further = [key for key in config if key.endswith("_token") and key not in NAMED and isinstance(config[key], str)]
    values: list[object] = [config.get(key) for key in (*NAMED, *further)]
    for key in _LISTS:
        listed = config.get(key)
        values += list(listed.values()) if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    texts = (token_text(value) for value in values)
    return list(dict.fromkeys(text for text in texts if text))


def steps(component: object) -> Iterator[dict[str, Any]]:
    """The steps of a pre_tokenizer or normalizer of tokenizer.json, with every Sequence flattened."""
    if not isinstance(component, dict):
        return
    if component.get("type") == "Sequence":
        for step in component.get("pretokenizers") or component.get("normalizers") or []:
            yield from steps(step)
    else:
        yield component


def _check_bpe(source: Path, model: Mapping[str, Any]) -> None:
    """Refuse what the tokenizers library answers with a message that names neither key nor value."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise YarnEdgeError(f"{source}: model.vocab is not a table of ids by token; download the file again")
    if not isinstance(merges, list):
        raise YarnEdgeError(f"{source}: model.merges is missing or not a list; download the file again")
    if len(set(vocab.values())) != len(vocab):
        seen: dict[int, str] = {}
        for text, index in vocab.items():
            if index in seen:
                raise YarnEdgeError(
                    f"{source}: model.vocab gives id {index} to {one_line(repr(seen[index]), 40)} and to "
                    f"{one_line(repr(text), 40)}; each token needs its own id"
                )
            seen[index] = text


def _pieces(source: Path, data: bytes) -> Iterator[Piece]:
    """The pieces of a serialized ModelProto (sentencepiece_model.proto: pieces = 1, trainer_spec = 2)."""
    kind = 1  # trainer_spec.model_type: 1 unigram (the default), 2 BPE
    found = []
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            found.append(Piece(bytes(piece.get(1, b"")).decode("utf-8"), score, piece.get(3, 1)))
        elif number == 2:
            kind = dict(_fields(value)).get(3, 1)
    if not found:
        raise ValueError("no pieces")
    if kind != 2:
        name = {1: "Unigram", 3: "word", 4: "character"}.get(kind, str(kind))
        raise YarnEdgeError(f"{source}: trainer_spec.model_type is {name}; only BPE is supported")
    yield from found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: int for varints, bytes for the rest (protobuf.dev/encoding)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        if tag & 7 not in (1, 2, 5):
            raise ValueError("not a protobuf message")
        size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        if size > len(data) - at:
            raise ValueError("a field passes the end")
        yield tag >> 3, data[at : at + size]
        at += size
