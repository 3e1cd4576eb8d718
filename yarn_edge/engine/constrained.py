"""A sampler that holds an answer to a `Constraint`, around llama.cpp's own grammar.

llama.cpp ends the process when a grammar is given a token that it does not allow, which happens when no token is allowed or a trigger
is followed by something else. So every token is tried before the grammar is told of it, and triggers are found here. If nothing is
allowed, or the grammar becomes too slow, the answer ends, and `failure` says why.

Only as many of the most probable tokens are tried as the samplers after this one can choose from. Where a text can be read in several
ways, no long tokens are tried: for one of n characters llama.cpp takes the number of ways to the n-th power of steps.
"""

from __future__ import annotations

import ctypes
import math
import re
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from yarn_edge.engine.constraint import Constraint
from yarn_edge.errors import YarnEdgeError

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama.h: llama_token_data
_UNKNOWN, _CONTROL = 1 << 0, 1 << 3  # enum llama_token_attr
_FIRST_TRIED, _MORE = 256, 8
_MOST_PATHS = 4096  # through a token
MOST_CPU_S = 0.5  # of one step: nested alternatives can double a grammar's states with each token
_TAIL_BYTES = 512  # behind which a trigger must fit
_vocabularies: WeakKeyDictionary[Model, _Vocabulary] = WeakKeyDictionary()


class _Vocabulary:
    """What constraints need to know of a vocabulary. hidden: control tokens that do not end an answer; ends: those that do."""

    def __init__(self, model: Model) -> None:
        attribute = model.api.llama_vocab_get_attr
        tokens = range(model.n_vocab)
        self.ends = [t for t in tokens if model.is_end_in_llama_cpp(t)]
        self.hidden = np.array([bool(attribute(model.vocab, t) & (_UNKNOWN | _CONTROL)) for t in tokens])
        self.hidden |= [model.is_end(t) for t in tokens]
        self.hidden[self.ends] = False
        self._characters: npt.NDArray[np.intp] | None = None
        self.ids = {model.token_bytes(int(t)).decode("utf-8", "replace"): int(t) for t in np.flatnonzero(self.hidden)}

    def characters(self, model: Model) -> npt.NDArray[np.intp]:
        """The number of characters of each token's text, 0 of those that end an answer. Only few answers need it: counted once asked."""
        if self._characters is None:
            counts = (len(model.token_bytes(t).decode("utf-8", "replace")) for t in range(model.n_vocab))
            self._characters = np.fromiter(counts, np.intp, model.n_vocab)
            self._characters[self.ends] = 0
        return self._characters


def _vocabulary(model: Model) -> _Vocabulary:
    if model not in _vocabularies:
        _vocabularies[model] = _Vocabulary(model)
    return _vocabularies[model]


def control_ids(model: Model, names: Iterable[str]) -> frozenset[int]:
    """The ids of control tokens by their names, of those that the vocabulary has; tokens that end an answer are none."""
    ids = _vocabulary(model).ids
    return frozenset(ids[name] for name in names if name in ids)


class ConstrainedSampler:
    """One answer's constraint. most: how many tokens the next samplers choose from; None: all.

    Raises YarnEdgeError if llama.cpp refuses the grammar, or the vocabulary has no token that ends an answer.
    """

    def __init__(self, model: Model, constraint: Constraint, most: int | None) -> None:
        self._model, self._api, self._constraint, self._most = model, model.api, constraint, most
        vocabulary = _vocabulary(model)
        if not vocabulary.ends:
            raise YarnEdgeError(f"{model.path}: no token ends an answer for llama.cpp, so none can be held to a form")
        self._end = vocabulary.ends[0]
        self._visible = control_ids(model, constraint.visible)
        self._hidden = vocabulary.hidden.copy()
        if constraint.ways > 1:
            self._hidden |= vocabulary.characters(model) > max(1, int(math.log(_MOST_PATHS, constraint.ways)))
        self._hidden[list(self._visible)] = False
        self._triggers = [re.compile(trigger) for trigger in constraint.triggers]
        self._waiting, self._skipping = bool(self._triggers), bool(constraint.skipped)
        self._tokens: list[tuple[int, int]] = []
        self._said, self._from = bytearray(), 0  # before the trigger: (token, where its bytes begin)
        self.failure: str | None = None
        self._grammar = self._fresh()
        self._callbacks = self._interface()
        self._struct = self._api.llama_sampler_i()
        for name, function in self._callbacks.items():
            setattr(self._struct, name, function)

    def sampler(self) -> Any:
        """A llama_sampler * for a chain, which frees it. This object must live as long."""
        return self._api.llama_sampler_init(ctypes.byref(self._struct), None)

    def close(self) -> None:
        """Free the grammar."""
        if self._grammar:
            self._api.llama_sampler_free(self._grammar)
        self._grammar = None

    def _fresh(self) -> Any:
        grammar = self._api.llama_sampler_init_grammar(self._model.vocab, self._constraint.grammar.encode(), b"root")
        if not grammar:
            raise YarnEdgeError("llama.cpp refuses the grammar that the answer's form became")
        return grammar

    def _interface(self) -> dict[str, Any]:
        api = self._api

        def guarded(work: Any) -> Any:
            def call(_sampler: object, argument: Any) -> None:
                if self.failure is None:
                    try:
                        began = time.thread_time()
                        work(argument)
                        if time.thread_time() - began > MOST_CPU_S:
                            self.failure = f"the form asked for takes over {MOST_CPU_S:g} s for one token: simplify it"
                    except Exception as error:  # nothing may go through C
                        self.failure = f"{type(error).__name__}: {error}"
                if self.failure is not None and work == self._apply:
                    self._give_up(argument)

            return call

        return {
            "name": api.llama_sampler_i_name(lambda _sampler: b"constraint"),
            "apply": api.llama_sampler_i_apply(guarded(self._apply)),
            "accept": api.llama_sampler_i_accept(guarded(self._accept)),
        }

    def _apply(self, candidates: Any) -> None:
        """Leave the most probable tokens that are allowed, in that order."""
        if self._waiting:
            return
        rows = _rows(candidates)
        usable = np.flatnonzero((rows["logit"] > -np.inf) & ~self._hidden[rows["id"]])
        tried = min(len(usable), max(_FIRST_TRIED, 2 * (self._most or 0))) if self._most else len(usable)
        while True:
            best = _largest(rows["logit"][usable], tried)
            kept = self._allowed(rows[usable[best]])
            if tried == len(usable) or len(kept) >= (self._most or 0):
                break
            tried = min(len(usable), _MORE * tried)
        if not len(kept):
            self.failure = "the form asked for needs a text that this model's vocabulary does not have"
            return
        rows[: len(kept)] = kept
        candidates.contents.size = len(kept)

    def _give_up(self, candidates: Any) -> None:
        _rows(candidates)[0] = (self._end, 0.0, 0.0)
        candidates.contents.size = 1

    def _allowed(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Those that the grammar allows next."""
        rows = np.ascontiguousarray(rows)
        array = self._api.llama_token_data_array()
        array.data = ctypes.cast(rows.ctypes.data, type(array.data))
        array.size, array.selected, array.sorted = len(rows), -1, False
        self._api.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return rows[rows["logit"] > -np.inf]

    def _accept(self, token: int) -> None:
        if self._waiting:
            self._look_for_trigger(token)
        elif not self._feed(token):
            self.failure = "an answer does not keep to its form"

    def _feed(self, token: int) -> bool:
        """Tell the grammar of a token, if it allows it."""
        if not len(self._allowed(np.array([(token, 0.0, 0.0)], _TOKEN))):
            return False
        self._api.llama_sampler_accept(self._grammar, token)
        return True

    def _look_for_trigger(self, token: int) -> None:
        self._tokens.append((token, len(self._said)))
        self._said += self._model.token_bytes(token, special=token in self._visible)
        if self._skipping and not self._skipped():
            return
        cut = max(self._from, len(self._said) - _TAIL_BYTES)
        text = self._said[cut:].decode("utf-8", "surrogateescape")
        first = 1 if cut > self._from else 0  # \A is the beginning of the answer
        found = next((match for trigger in self._triggers if (match := trigger.search(text, first))), None)
        if found is None:
            return
        start = cut + len(text[: found.start(1 if found.lastindex else 0)].encode("utf-8", "surrogateescape"))
        if all(self._feed(part) for part in self._after(start)):
            self._waiting = False
        else:  # it does not go on like a call: this is text
            self._from = len(self._said)
            self.close()
            self._grammar = self._fresh()

    def _skipped(self) -> bool:
        """Whether a block at the answer's beginning that holds no calls, such as reasoning, is over or was none."""
        said = bytes(self._said).lstrip()
        for opening, closing in self._constraint.skipped:
            if said.startswith(opening.encode()):
                at = self._said.find(closing.encode(), len(opening))
                if at >= 0:
                    self._from, self._skipping = at + len(closing.encode()), False
                return at >= 0
        if any(opening.encode().startswith(said) for opening, _closing in self._constraint.skipped):
            return False
        self._skipping = False
        return True

    def _after(self, start: int) -> list[int]:
        """The tokens of what was said from a byte on; the first one may have begun before it."""
        tokens: list[int] = []
        for (token, begin), end in zip(
            self._tokens, [*(begin for _token, begin in self._tokens[1:]), len(self._said)], strict=True
        ):
            if begin >= start:
                tokens.append(token)
            elif end > start:
                part = bytes(self._said[start:end])
                text = part.decode("utf-8", "replace")
                tokens += self._model.tokenize(text, add_special=False, parse_special=False)
                if b"".join(map(self._model.token_bytes, tokens)) != part:
                    return [self._end]
        return tokens


def _rows(candidates: Any) -> npt.NDArray[Any]:
    """llama_token_data_array * as an array that shares its memory."""
    array = candidates.contents
    address = ctypes.cast(array.data, ctypes.c_void_p).value or 0
    memory = (ctypes.c_char * (array.size * _TOKEN.itemsize)).from_address(address)
    return np.frombuffer(memory, _TOKEN)


def _largest(logits: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Indices of the `count` largest, from the largest down."""
    chosen = np.argpartition(-logits, count - 1)[:count] if 0 < count < len(logits) else np.arange(len(logits))
    return chosen[np.lexsort((chosen, -logits[chosen]))]
