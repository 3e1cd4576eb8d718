"""The pre-tokenizer of a checkpoint's vocabulary, proved rather than guessed.

llama.cpp loads the vocabulary under each name of `pretokenizers.PRETOKENIZERS` until its token ids equal those of the
checkpoint's own tokenizer.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from yarn_edge.checkpoint.tokenizer import Reference, TokenizersReference
from yarn_edge.errors import YarnEdgeError, one_line, os_error
from yarn_edge.gguf.header import pack_key, write_arrays
from yarn_edge.progress import bar
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import (
    STRESS_TEXTS,
    TokenComparison,
    compare_tokens,
    known_gaps,
    reference_encoder,
    stress_texts,
)

from .pretokenizers import pretokenizer_candidates, signature
from .vocab import Vocabulary


def prove(vocabulary: Vocabulary, checkpoint: Path, reference: Reference | None = None) -> Vocabulary:
    """The vocabulary with the `pre` under which llama.cpp gives the checkpoint's token ids, and notes on known gaps.

    reference: the result of `reference_encoder`, if at hand. If no name fits, raises YarnEdgeError with the closest one and its
    first difference.
    """
    try:
        return _prove(vocabulary, reference or reference_encoder(checkpoint))
    except OSError as error:
        raise os_error(error, tempfile.gettempdir()) from error


def _prove(vocabulary: Vocabulary, reference: Reference) -> Vocabulary:
    encode = lru_cache(maxsize=None)(reference.__call__)
    texts = stress_texts(vocabulary.tokens, (m.content for _, m in sorted(reference.markup.items())))
    names = [vocabulary.pre]
    if isinstance(reference, TokenizersReference) and vocabulary.model == "gpt2":
        names = [row.name for row in pretokenizer_candidates(signature(reference.settings, reference.model))]
    closest: tuple[int, str, TokenComparison] | None = None
    with (
        bar("Proving the tokenizer", len(names)) as advance,
        tempfile.TemporaryDirectory(prefix="yarn-edge-vocab-") as folder,
    ):
        path = write_vocab_gguf(vocabulary, Path(folder) / "vocab.gguf")
        for name in names:
            with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": name}) as model:
                gaps = known_gaps(reference, name)
                result = compare_tokens(model, encode, STRESS_TEXTS, gaps, closest[0] if closest else None)
                if result.mismatch is None:  # the full proof takes ten times as long
                    result = compare_tokens(model, encode, texts, gaps)
            if result.mismatch is None:
                return replace(vocabulary, pre=name, notes=(*vocabulary.notes, *result.notes))
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


def write_vocab_gguf(vocabulary: Vocabulary, path: Path) -> Path:
    """A GGUF without tensors, loadable with `Model(path, vocab_only=True)`. Returns `path`."""
    keys = {"general.architecture": "llama", **vocabulary.keys()}
    write_arrays(path, [pack_key(key, value) for key, value in keys.items()], {})
    return path
