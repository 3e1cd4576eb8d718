"""What quantized caches cost at length: the 16-bit model with each type of K and of V, next to an f16 cache, on the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yarn_edge.averages import Mean
from yarn_edge.runtime.kv_cache import join_kv_types, kv_types

from ..quality.compare import compare
from ..quality.compare_outcome import figures_of
from ..quality.text_settings import TextSettings
from ..scoring.variants import Variant, parse_variant

KINDS = ("f16", "q8_0", "q5_0", "q4_0")  # from best to worst, for K and for V


@dataclass(frozen=True)
class CacheLoss:
    """KL in nats for each token, next to an f16 cache. k: by the type of K alone, v: by the type of V alone."""

    k: Mapping[str, float]
    v: Mapping[str, float]

    @property
    def kv_types(self) -> list[str]:
        """All pairs of types."""
        return [join_kv_types(k, v) for k in self.k for v in self.v]

    def nats(self, kv_type: str) -> float:
        """Of a pair. The errors of K and V are independent, so what they cost adds up."""
        k, v = kv_types(kv_type)
        return self.k[k] + self.v[v]


NO_LOSS = CacheLoss({"f16": 0.0}, {"f16": 0.0})


def cache_loss(model: Path, kinds: Sequence[str], text: TextSettings, threads: int | None) -> CacheLoss:
    """Measured with the weights of `model`, a 16-bit GGUF. kinds: the types besides f16 that its cache can have."""
    of_k, of_v = ({kind: parse_variant(f"{model}@kv-{part}={kind}") for kind in kinds} for part in ("k", "v"))
    found = losses_of(parse_variant(str(model)), [*of_k.values(), *of_v.values()], text, threads)
    k, v = ({kind: found[v.label].mean for kind, v in part.items()} for part in (of_k, of_v))
    return CacheLoss({"f16": 0.0, **k}, {"f16": 0.0, **v})


def losses_of(base: Variant, others: Sequence[Variant], text: TextSettings, threads: int | None) -> dict[str, Mean]:
    """KL(base || other) in nats with its standard error, by the label of each of `others`. Raises what ended it early."""
    if not others:
        return {}
    comparison, _ = compare(base, others, text, threads=threads)
    if comparison.ended is not None:
        raise comparison.ended
    figures = {outcome.variant.label: figures_of(comparison, outcome, None) for outcome in comparison.outcomes}
    return {label: Mean(f.n_tokens, f.kld_mean, f.kld_stderr) for label, f in figures.items()}
