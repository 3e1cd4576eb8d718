"""The settings of a context as one value, checked when it is made: what `Context` takes, and what a memory plan is of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import MAX_THREADS
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.number_rules import MAX_CONTEXT
from yarn_edge.runtime.kv_cache import join_kv_types, kv_types

# fast: our kernels (fast-few, fast-many: for up to 16 queries, or for more; ggml's flash attention for the others); flash, plain:
# ggml's; ggml: llama.cpp decides between these two; auto: `yarn_edge.attention.policy` decides between all.
Attention = Literal["auto", "fast", "fast-few", "fast-many", "ggml", "flash", "plain"]

MAX_SEQUENCES = 256  # llama.h: LLAMA_MAX_SEQ


@dataclass(frozen=True)
class ContextSettings:
    """n_ctx: tokens that the cache holds for each of its n_seq sequences (0: the context that the model declares).
    unified: all sequences share n_ctx cells instead, and each may hold all of them.

    n_batch: tokens of one llama.cpp call. n_ubatch: tokens of one graph (None: n_batch). n_outputs: tokens of one batch that
    may get logits, for which memory is reserved (0: all). kv_type: of K and V, as in `kv_cache`. threads: None
    for the number of physical cores. arguments: scaling values (None: every value spelled out from the file).
    embeddings: whether each token's vector in the last layer is an output, not pooled.
    attention: what computes it; "auto" is up to the policy, and llama.cpp decides if nobody has asked it.
    Raises YarnEdgeError for values that llama.cpp cannot take.
    """

    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int | None = None
    n_seq: int = 1
    n_outputs: int = 0
    kv_type: str = "f16"
    threads: int | None = None
    arguments: RuntimeArguments | None = None
    attention: Attention = "ggml"
    unified: bool = False
    embeddings: bool = False

    @property
    def fast(self) -> bool:
        """Whether our kernels compute attention, or some of it."""
        return self.attention.startswith("fast")

    @property
    def all_ctx(self) -> int:
        """Tokens that the sequences hold together; 0 if n_ctx is."""
        return self.n_ctx * (1 if self.unified else self.n_seq)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_type", join_kv_types(*kv_types(self.kv_type)))
        if not 0 <= self.n_ctx <= MAX_CONTEXT or self.n_batch < 1 or not 1 <= self.n_seq <= MAX_SEQUENCES:
            raise YarnEdgeError(
                f"{self.n_seq} contexts of {self.n_ctx} tokens in batches of {self.n_batch} are not possible"
            )
        if self.unified and 0 < self.n_outputs < self.n_seq:
            raise YarnEdgeError(f"{self.n_outputs} outputs for {self.n_seq} sequences: llama.cpp needs one for each")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise YarnEdgeError(f"{self.threads} threads: llama.cpp takes 1 to {MAX_THREADS}")
