"""Text -> token ids by llama.cpp, whatever the text: long ones in pieces, on a stack that holds the recursion of std::regex."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.llama_api import llama
from yarn_edge.runtime.text_pieces import Cuts, cuts
from yarn_edge.runtime.token_names import TokenNames

_SHORT = 4096  # characters for which any stack is deep enough
# Under 670 bytes per character were measured (100,000 of any class, all pre-tokenizers).
_STACK, _STACK_PER_BYTE = 8 << 20, 1536
_UNKNOWN, _CONTROL, _USER_DEFINED = 1 << 0, 1 << 3, 1 << 4  # enum llama_token_attr
_starting = threading.Lock()  # the stack size of new threads is the process's


class Tokenizer:
    """The tokenizer of a loaded vocabulary. vocab: llama_vocab *; metadata: of its GGUF; origin: names it in errors; ends: ids that
    end an answer besides llama.cpp's.
    """

    def __init__(self, vocab: Any, metadata: dict[str, Any], origin: str, ends: Collection[int] = ()) -> None:
        self._api, self._vocab, self._metadata, self._origin, self._ends = llama(), vocab, metadata, origin, ends

    def tokenize(
        self, text: str, add_special: bool, parse_special: bool, at_most: int | None = None, until: float | None = None
    ) -> list[int]:
        """Token ids of the text, the same as llama.cpp's for the whole.

        add_special: add the BOS/EOS that the file asks for; parse_special: markup becomes special tokens; at_most: return soon
        after that many ids, for a caller who wants no more; until: a time.monotonic() to give up at. Raises YarnEdgeError then,
        and if the text has a part that is too long to tokenize and cannot be cut.
        """
        if len(text) <= _SHORT:
            return self._ids(text.encode("utf-8", errors="surrogatepass"), add_special, parse_special)
        where = self._cuts_special if parse_special else self._cuts_plain
        ids: list[int] = []
        for piece in where.pieces(text):
            ids += self._ids_of_piece(piece, parse_special)
            if at_most is not None and len(ids) > at_most:
                break
            if until is not None and time.monotonic() > until:
                raise YarnEdgeError(f"the text takes too long to tokenize: after {len(ids)} tokens the time was up")
        return self._with_specials(ids) if add_special else ids

    @cached_property
    def control_names(self) -> TokenNames:
        """The texts that must stay text in a message: of control tokens, by llama.cpp's reading, and of everything that ends an answer,
        whatever type the file gives it.
        """
        found = set(self._names(_UNKNOWN | _CONTROL).names)
        is_end = self._api.llama_vocab_is_eog
        tokens = range(self._api.llama_vocab_n_tokens(self._vocab))
        for token in {*self._ends, *(t for t in tokens if is_end(self._vocab, t))}:
            found |= {self._text(token), self.token_bytes(token).decode("utf-8", errors="surrogateescape")}
        return TokenNames(found)

    def literal(self, text: str, is_end: Callable[[int], bool]) -> list[int]:
        """Ids of a text that must not become a token that ends an answer, even if the file lets plain text become one."""
        ids = self.tokenize(text, add_special=False, parse_special=False)
        if not any(map(is_end, ids)):
            return ids
        if len(text) == 1:
            raise YarnEdgeError(f"{self._origin}: {text!r} ends an answer, so no message can contain it")
        return self.literal(text[:1], is_end) + self.literal(text[1:], is_end)

    @cached_property
    def _cuts_special(self) -> Cuts:
        return cuts(self._metadata, self._names(_UNKNOWN | _CONTROL | _USER_DEFINED))

    @cached_property
    def _cuts_plain(self) -> Cuts:
        return cuts(self._metadata, self._names(_USER_DEFINED))

    def _names(self, attributes: int) -> TokenNames:
        attribute = self._api.llama_vocab_get_attr
        tokens = range(self._api.llama_vocab_n_tokens(self._vocab))
        return TokenNames(self._text(t) for t in tokens if attribute(self._vocab, t) & attributes)

    def _text(self, token: int) -> str:
        return str(self._api.llama_vocab_get_text(self._vocab, token).decode("utf-8", errors="surrogateescape"))

    def token_bytes(self, token: int, special: bool = True) -> bytes:
        """The bytes of one token, possibly part of a character. special: whether markup tokens give their text or b""."""
        room = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            count = self._api.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
        raise YarnEdgeError(f"{self._origin}: token {token} has no text")

    def _with_specials(self, ids: list[int]) -> list[int]:
        """The ids with what llama.cpp adds to a text on both sides."""
        probe = self._ids(b"a", False, False)
        marked = self._ids(b"a", True, False)
        at = next(i for i in range(len(marked)) if marked[i : i + len(probe)] == probe)
        return [*marked[:at], *ids, *marked[at + len(probe) :]]

    def _ids_of_piece(self, piece: str, parse_special: bool) -> list[int]:
        data = piece.encode("utf-8", errors="surrogatepass")
        if len(piece) <= _SHORT:
            return self._ids(data, False, parse_special)
        return _on_deep_stack(_STACK + _STACK_PER_BYTE * len(data), lambda: self._ids(data, False, parse_special))

    def _ids(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
        room = len(data) + 16
        for _ in range(2):
            buffer = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(self._vocab, data, len(data), buffer, room, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            room = -count
        raise YarnEdgeError(f"{self._origin}: llama.cpp cannot tokenize a text of {len(data)} bytes")


def _on_deep_stack(n_bytes: int, work: Callable[[], list[int]]) -> list[int]:
    """The result of `work` in a thread with a stack of that size. Only what is used of it takes memory, until the thread ends."""
    done: list[list[int]] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    try:
        with _starting:
            usual = threading.stack_size(n_bytes & ~0xFFFF)
            try:
                thread.start()
            finally:
                threading.stack_size(usual)
    except (RuntimeError, ValueError) as error:
        raise YarnEdgeError(
            f"no memory for a stack of {n_bytes >> 20} MiB, which tokenizing a long text needs"
        ) from error
    thread.join()
    if failed:
        raise failed[0]
    return done[0]
