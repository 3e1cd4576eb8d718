"""A checkpoint's tokenizer.model (SentencePiece) as the reference for a GGUF's tokens.

The `sentencepiece` library runs it; added tokens are cut out of the text first, as in transformers. That library's API
does not show the kinds of pieces, so the few fields that matter are read from the protobuf message itself.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.added_tokens import left_out_notes, pad_without_row, read_added_tokens
from yarn_edge.checkpoint.config_file import MAX_JSON_BYTES
from yarn_edge.checkpoint.tokenizer import Markup, Reference, named_texts, special_texts, token_text, tokenizer_config
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.regular_file import read_regular

# A second normalizer_spec (field 3) with add_dummy_prefix (field 3) = 0: protobuf merges it into the first.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class VocabularyPiece:
    """One entry of a SentencePiece model. kind: numbered as in GGUF: 1 normal, 2 unknown, 3 control, … 6 byte."""

    text: str
    score: float
    kind: int


class SentencePieceReference(Reference):
    """`tokenizer.model`, with BOS and EOS if add_bos_token and add_eos_token of tokenizer_config.json are true.

    pieces: those of the model itself. ids: as the config names them, else as the model does.
    """

    def __init__(self, checkpoint: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.source = checkpoint / "tokenizer.model"
        self.config = tokenizer_config(checkpoint)
        self.settings = {}
        try:
            data = read_regular(self.source, MAX_JSON_BYTES)
            self.pieces = list(_pieces(self.source, data))
            self.processor = SentencePieceProcessor(model_proto=data)
            self.bare = SentencePieceProcessor(model_proto=data + _NO_DUMMY_PREFIX)
        except (RuntimeError, ValueError, TypeError, IndexError, struct.error) as error:
            raise YarnEdgeError(
                f"{self.source}: not a SentencePiece model ({one_line(str(error), 100)}); "
                "add the checkpoint's tokenizer.json"
            ) from error
        self.vocabulary = {piece.text: index for index, piece in enumerate(self.pieces)}
        if len(self.vocabulary) != len(self.pieces):
            raise YarnEdgeError(f"{self.source}: the same piece appears twice; add the checkpoint's tokenizer.json")
        self.markup = {i: Markup(p.text, p.kind != 4, False) for i, p in enumerate(self.pieces) if p.kind in (2, 3, 4)}
        self._read_added(checkpoint)
        self._place_pad(checkpoint)
        self._id_of = {m.content: index for index, m in self.markup.items()}
        longest_first = sorted((text for text in self._id_of if text), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self.ids = self._special_ids(checkpoint)
        if "add_bos_token" not in self.config:
            self.notes = ("tokenizer_config.json has no add_bos_token: no BOS is added, as in transformers 5",)
        self.notes += left_out_notes(self.left_out)

    def _read_added(self, checkpoint: Path) -> None:
        """added_tokens.json and added_tokens_decoder: {"<tool>": 32000} and {"32000": {"content": "<tool>", …}}."""
        special = set(special_texts(self.config))
        for name, index in read_added_tokens(checkpoint).items():
            self._add(index, Markup(name, name in special, False))
        for key, token in (self.config.get("added_tokens_decoder") or {}).items():
            if isinstance(token, dict) and (text := token_text(token)):
                strips = any(token.get(k) for k in ("lstrip", "rstrip", "single_word"))
                self._add(int(key), Markup(text, bool(token.get("special")) or text in special, strips))
        for known in sorted(special & self.vocabulary.keys()):
            self._add(self.vocabulary[known], Markup(known, True, False))

    def _place_pad(self, checkpoint: Path) -> None:
        """A pad token that is only named gets the next id, as in transformers. Without a row, it is left out."""
        text = token_text(self.config.get("pad_token"))
        if text is not None and text not in self.vocabulary:
            self._add(max(self.vocabulary.values()) + 1, Markup(text, True, False))
        self.left_out = pad_without_row(checkpoint, named_texts(self.config), self.vocabulary)
        for left, index in self.left_out.items():
            del self.vocabulary[left], self.markup[index]

    def _add(self, index: int, token: Markup) -> None:
        previous = self.vocabulary.setdefault(token.content, index)
        if previous != index:
            raise YarnEdgeError(
                f"{self.source}: the added token {one_line(repr(token.content), 60)} has the ids {previous} and "
                f"{index}; correct added_tokens.json or tokenizer_config.json"
            )
        self.markup[index] = token

    def _special_ids(self, checkpoint: Path) -> dict[str, int]:
        own = self.processor
        model = {"bos": own.bos_id(), "eos": own.eos_id(), "unk": own.unk_id(), "pad": own.pad_id()}
        ids = {name: index for name, index in model.items() if index >= 0}
        for name in model:
            text = token_text(self.config.get(f"{name}_token"))
            if text in self.left_out:
                ids.pop(name, None)
                continue
            if text is not None and text not in self.vocabulary:
                raise YarnEdgeError(
                    f"{checkpoint / 'tokenizer_config.json'}: {name}_token {one_line(repr(text), 60)} is not in the "
                    "vocabulary; add it to added_tokens_decoder"
                )
            if text is not None:
                ids[name] = self.vocabulary[text]
        return ids

    def __call__(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._split.finditer(text):
            ids += self._plain(text, at, match.start())
            ids.append(self._id_of[match.group()])
            at = match.end()
        ids += self._plain(text, at, len(text))
        bos, eos = ([self.ids[n]] if add_special and self._adds(n) else [] for n in ("bos", "eos"))
        return bos + ids + eos

    def _adds(self, name: str) -> bool:
        return bool(self.config.get(f"add_{name}_token")) and name in self.ids

    def _plain(self, text: str, start: int, end: int) -> list[int]:
        if start == end:
            return []
        processor = self.bare if start and self.prepends_space_once else self.processor
        return list(processor.encode(text[start:end]))

    @property
    def prepends_space_once(self) -> bool:
        return not self.config.get("legacy", False)  # transformers 5: legacy=False unless the file says otherwise


def _pieces(source: Path, data: bytes) -> Iterator[VocabularyPiece]:
    """The pieces of a serialized ModelProto (sentencepiece_model.proto: pieces = 1, trainer_spec = 2)."""
    kind = 1  # trainer_spec.model_type: 1 unigram (the default), 2 BPE
    pieces = []
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(VocabularyPiece(bytes(piece.get(1, b"")).decode("utf-8"), score, piece.get(3, 1)))
        elif number == 2:
            kind = dict(_fields(value)).get(3, 1)
    if not pieces:
        raise ValueError("no pieces")
    if kind != 2:
        name = {1: "Unigram", 3: "word", 4: "character"}.get(kind, str(kind))
        raise YarnEdgeError(f"{source}: trainer_spec.model_type is {name}; only BPE is supported")
    yield from pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: int for varints, else bytes (protobuf.dev/encoding)."""
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
            raise ValueError("a field extends past the end")
        yield tag >> 3, data[at : at + size]
        at += size
