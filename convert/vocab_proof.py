"""The pre-tokenizer of a checkpoint's vocabulary, proved rather than guessed.

llama.cpp loads the vocabulary under each name of `pretokenizers.PRETOKENIZERS` until its token ids equal those of the
checkpoint's own tokenizer. The same file shows which ends of an answer llama.cpp knows by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.tokenizer import Reference, TokenizersReference
from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf.header import pack_key, write_arrays
from yarn_edge.llama_rules.ends import END_SLOTS, OWN_ENDS, token_names
from yarn_edge.progress import bar
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import (
    STRESS_TEXTS,
    Encode,
    TokenComparison,
    compare_tokens,
    known_gaps,
    reference_encoder,
    stress_texts,
)
from yarn_edge.writer import scratch_folder

from .pretokenizers import pretokenizer_candidates, signature
from .vocab import Vocabulary

# Differing comparisons after which a pre-tokenizer is given up: llama.cpp compiles its expressions for each text.
_HOPELESS = 40


class UnprovedTokenizer(YarnEdgeError):
    """A `pre` that was chosen by few texts fails at others: `prove` is to try all names with all texts."""


def prove(
    vocabulary: Vocabulary,
    checkpoint: Path,
    reference: Reference | None = None,
    encode: Encode | None = None,
    whole: bool = True,
) -> Vocabulary:
    """The vocabulary with the `pre` under which llama.cpp gives the checkpoint's token ids, and notes on known gaps.

    reference: the result of `reference_encoder`, if at hand. encode: its ids, if they are to be remembered. whole: with all texts;
    otherwise with STRESS_TEXTS alone and without notes on gaps, for a caller who goes on to compare all. If no name fits, raises
    YarnEdgeError with the closest one and its first difference.
    """
    try:
        reference = reference or reference_encoder(checkpoint)
        return _prove(vocabulary, reference, encode or remembered(reference), whole)
    except OSError as error:
        raise os_error(error, tempfile.gettempdir()) from error


def remembered(reference: Reference) -> Encode:
    """The ids of a checkpoint's own tokenizer, which works only once on each text."""
    return lru_cache(maxsize=None)(reference.__call__)


def _prove(vocabulary: Vocabulary, reference: Reference, encode: Encode, whole: bool) -> Vocabulary:
    texts = stress_texts(vocabulary.tokens, (m.content for _, m in sorted(reference.markup.items())))
    names = [vocabulary.pre]
    if isinstance(reference, TokenizersReference) and vocabulary.model == "gpt2":
        names = [row.name for row in pretokenizer_candidates(signature(reference.settings, reference.model))]
    closest: tuple[int, str, TokenComparison] | None = None
    with bar("Proving the tokenizer", len(names)) as advance, scratch_folder("yarn-edge-vocab-") as folder:
        path = write_vocab_gguf(vocabulary, folder / "vocab.gguf")
        for name in names:
            with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": name}) as model:
                gaps = known_gaps(reference, name)
                give_up = min(closest[0], _HOPELESS) if closest else _HOPELESS
                result = compare_tokens(model, encode, STRESS_TEXTS, gaps, give_up)
                if whole and result.mismatch is None:  # which takes ten times as long
                    result = compare_tokens(model, encode, texts, gaps)
                missing = [token for token in vocabulary.ends if not model.is_end_in_llama_cpp(token)]
            if result.mismatch is None:
                notes = result.notes if whole else ()
                proved = replace(vocabulary, pre=name, notes=(*vocabulary.notes, *notes))
                return _with_ends(proved, path, missing)
            advance(1)
            distance = result.n_different + result.n_explained
            if closest is None or distance < closest[0]:
                closest = distance, name, result
    assert closest is not None
    _, name, result = closest
    raise YarnEdgeError(
        f"{reference.source}: llama.cpp cannot tokenize like this checkpoint; the closest of {len(names)} is "
        f"tokenizer.ggml.pre={name}, which differs in {result.n_different} of {2 * result.n_texts} comparisons, first in "
        f"{one_line(str(result.mismatch), 300)}"
    )


def _with_ends(vocabulary: Vocabulary, path: Path, missing: Sequence[int]) -> Vocabulary:
    """The vocabulary with keys for the ends that llama.cpp misses: its own keys as far as it heeds them, then ours.

    path: the file of `write_vocab_gguf`.
    """
    slots: dict[str, int] = {}
    own: list[int] = []
    for token in missing:
        free = END_SLOTS[len(slots) :][:1]
        trial = slots | dict.fromkeys(free, token)
        with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": vocabulary.pre, **trial}) as model:
            heeded = model.is_end_in_llama_cpp(token)
        if heeded:
            slots = trial
        else:
            own.append(token)
    notes = [f"answers also end at {token_names(vocabulary.tokens, [i])}, written as {key}" for key, i in slots.items()]
    if own:
        notes.append(
            f"answers also end at {token_names(vocabulary.tokens, own)}, but only in yarn-edge: llama.cpp has no key for "
            "them, so give other programs these texts as stop strings"
        )
    keys: dict[str, Any] = {**slots, **({OWN_ENDS: own} if own else {})}
    return replace(vocabulary, end_keys=keys, notes=(*vocabulary.notes, *notes))


def write_vocab_gguf(vocabulary: Vocabulary, path: Path) -> Path:
    """A GGUF without tensors, loadable with `Model(path, vocab_only=True)`. Returns `path`."""
    write_arrays(path, [pack_key("general.architecture", "llama"), *vocabulary.entries().values()], {})
    return path
