"""What workers are sent: a variant without its file, and the unit that scores a window with it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import TRUST
from yarn_edge.graph.opening import open_context
from yarn_edge.jobs.sent_file import SentFile
from yarn_edge.jobs.unit import Unit, UnitResult, kept_open
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.first_load import trusted
from yarn_edge.runtime.llama_api import llama
from yarn_edge.runtime.lora import LoraFile

from .evaluate import Scores, score
from .variants import Variant
from .windows import Window


@dataclass(frozen=True)
class SentVariant:
    """A `Variant` whose files the worker reads itself. loras: files and scales; trusted: whether --trust was given."""

    file: SentFile
    label: str
    kv_type: str
    backend: str
    arguments: RuntimeArguments | None
    overrides: tuple[tuple[str, float], ...]
    loras: tuple[tuple[SentFile, float], ...]
    trusted: bool

    @classmethod
    def of(cls, variant: Variant) -> SentVariant:
        """What makes the same variant on a worker. Raises YarnEdgeError for one whose layers are split."""
        if variant.split is not None:
            raise YarnEdgeError(f"{variant.label}: --rpc and --layers-on are for a run in one process, without --on")
        return cls(
            SentFile.of(variant.gguf),
            variant.label,
            variant.kv_type,
            variant.backend,
            variant.arguments,
            tuple(sorted(variant.overrides.items())),
            tuple((SentFile.of(lora.gguf), lora.scale) for lora in variant.loras),
            trusted(),
        )

    def variant(self) -> Variant:
        """On the worker. Raises YarnEdgeError if its files are missing, or are not the same."""
        if self.trusted:
            os.environ[TRUST] = "1"
        loras = tuple(LoraFile(file.read(), scale) for file, scale in self.loras)
        overrides = dict(self.overrides)
        return Variant(self.label, self.file.read(), self.kv_type, self.backend, self.arguments, overrides, loras)

    def identity(self) -> list[object]:
        """What determines its logits, wherever its files are."""
        arguments = None if self.arguments is None else asdict(self.arguments)
        loras = [[file.identity, scale] for file, scale in self.loras]
        return [self.file.identity, self.kv_type, self.backend, arguments, self.overrides, loras]


def unit_key(work: str, parts: Sequence[object], windows: Sequence[Window] = ()) -> str:
    """SHA-256 of what determines a unit's result: the work, its values as JSON, the windows, and the version of llama.cpp."""
    digest = hashlib.sha256(json.dumps([work, llama().__version__, *parts]).encode())
    for window in windows:
        digest.update(np.asarray([window.first, *window.tokens], dtype=np.int64).tobytes())
    return digest.hexdigest()


def settings_identity(settings: ContextSettings) -> Mapping[str, object]:
    """The settings without the number of threads, which changes no digit."""
    return asdict(replace(settings, threads=None))


def score_unit(sent: SentVariant, settings: ContextSettings, window: Window, label: str) -> Unit:
    """The unit that scores one window. settings: resolved, so that every worker computes with the same batches and attention."""
    key = unit_key("score_window", [sent.identity(), settings_identity(settings)], [window])
    return Unit(score_window, (sent, settings, window), key, label, len(window.tokens) - 1)


def score_window(sent: SentVariant, settings: ContextSettings, window: Window) -> UnitResult:
    """On a worker: the negative log-likelihoods `nll` of one window."""
    context = kept_open((sent, settings), lambda: context_of_sent(sent, settings))
    scores = Scores.empty([window])
    score(context, scores, threads=settings.threads)
    return UnitResult({"nll": scores.nll[0]}, {"tokens": scores.tokens, "seconds": scores.seconds})


@contextmanager
def context_of_sent(sent: SentVariant, settings: ContextSettings) -> Iterator[Context]:
    """A context of the variant, on a worker."""
    with sent.variant().load() as model, open_context(model, settings) as context:
        yield context
