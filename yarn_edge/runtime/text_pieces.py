"""Where a long text can be cut so that its pieces have the token ids of the whole.

llama.cpp matches most pre-tokenizers with std::regex, which recurses for every character of a run (30,000 equal characters overflow
a stack of 8 MiB), and it partitions a text at markup in time that grows with the square of the occurrences. Pieces bound both. A cut
is where no token can span it and no pattern looks across it:

- byte-level BPE: after a single line break, before a single space between ASCII letters, before a comma or full stop between Han
  characters;
- SentencePiece and SuperBPE: at the first two, if no token spans them. If the tokenizer puts a space in front of every piece, only
  at spaces, which are left out then;
- before markup that no other markup can overlap.

Source: llama-vocab.cpp and unicode.cpp of llama-cpp-python 0.3.36. `tests/runtime/test_text_pieces.py` compares pieces with wholes
for every pre-tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.token_names import TokenNames

PIECE_CHARS = 1 << 15  # of a piece, about, where the text can be cut
MAX_MARKUP = 500  # occurrences in a piece
MAX_PIECE = 1 << 18  # characters, where it cannot: 2 s under the slowest patterns
# Runs for which a pre-tokenizer's patterns take time that grows with their square.
_SLOW = {"superbpe": r"\d{8193}", "jais-2": r"\s{32769}"}

_LINE, _SPACE, _HAN = r"(?<=[!-~\w]\n)(?=[!-.0-~\w])", r"(?<=[A-Za-z])(?= [A-Za-z])", r"(?<=[一-龥])(?=[，。][一-龥])"
_BPE_PLACES = {"exaone-moe": (_LINE, _HAN)}  # its words contain spaces
_SPELLED = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n"})  # white space, as tokens spell it
_STRIPS_LEFT = frozenset({"<mask>", "[MASK]"})  # these take white space in front of them


@dataclass(frozen=True)
class Cuts:
    """Where the texts of a vocabulary can be cut. places: empty matches; drops_space: whether a piece starts behind the space at
    its cut; markup: names in front of which a text can be cut; slow: a run that cannot be tokenized.
    """

    places: re.Pattern[str] | None
    drops_space: bool
    markup: TokenNames
    slow: re.Pattern[str] | None

    def pieces(self, text: str) -> Iterator[str]:
        """The text in pieces of about PIECE_CHARS characters and MAX_MARKUP markup tokens, longer where it cannot be cut.

        Raises YarnEdgeError at a piece that would take too much time or memory.
        """
        start = 0
        for end in (*self._at_markup(text), len(text)):
            for piece in self._at_places(text[start:end]):
                self._check(piece)
                yield piece
            start = end

    def _check(self, piece: str) -> None:
        if len(piece) > MAX_PIECE:
            raise YarnEdgeError(
                f"the text has {len(piece)} characters without a line break or a space between words, starting with "
                f"{one_line(piece[:20])!r}: at most {MAX_PIECE} can be tokenized"
            )
        if self.slow is not None and (run := self.slow.search(piece)):
            raise YarnEdgeError(
                f"the text has over {len(run[0]) - 1} digits or spaces in a row, too many for this model's pre-tokenizer"
            )

    def _at_markup(self, text: str) -> Iterator[int]:
        last, count = 0, 0
        for at, _name in self.markup.find(text):
            count += 1
            if count >= MAX_MARKUP or at - last >= PIECE_CHARS:
                yield at
                last, count = at, 0

    def _at_places(self, text: str) -> Iterator[str]:
        start = 0
        while self.places is not None and len(text) - start > PIECE_CHARS:
            place = self.places.search(text, start + PIECE_CHARS)
            if place is None:
                break
            yield text[start : place.start()]
            start = place.start() + self.drops_space
        yield text[start:]


def cuts(metadata: dict[str, Any], markup: TokenNames) -> Cuts:
    """Where texts can be cut. metadata: of the GGUF; markup: the names that are recognized in the texts."""
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    wanted: tuple[str, ...] = ()
    drops_space = False
    if model == "gpt2" and pre != "superbpe":
        wanted = _BPE_PLACES.get(str(pre), (_LINE, _SPACE, _HAN))
    elif model in ("gpt2", "gemma4", "llama"):
        drops_space = model == "llama" and bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
        tokens = [t.translate(_SPELLED) for t in metadata.get("tokenizer.ggml.tokens", ()) if len(t) > 1]
        wanted = tuple(p for p in ((_SPACE,) if drops_space else (_LINE, _SPACE)) if not _inside(p, tokens))
    wanted = tuple(p for p in wanted if not _inside(p, markup.names))
    apart = TokenNames(markup.apart().names - _STRIPS_LEFT)
    slow = re.compile(_SLOW[pre]) if pre in _SLOW else None
    return Cuts(re.compile("|".join(wanted)) if wanted else None, drops_space, apart, slow)


def _inside(pattern_text: str, names: Iterable[str]) -> bool:
    """Whether a text can be cut within one of the names."""
    pattern, blank = re.compile(pattern_text), re.compile("[ \n，。]")
    return any(
        0 < place.start() - 1 < len(name)
        for name in filter(blank.search, names)
        for around in ("a", "一")
        for place in pattern.finditer(around + name + around)
    )
