"""How the next token is chosen: llama.cpp's own samplers, chained in the order that its tools use.

`Sampling` is the description, a frozen value that is checked on creation; `Sampling.chain` is the native chain for one answer.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yarn_edge.errors import YarnEdgeError

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

# llama.cpp common/common.h, common_params_sampling: penalty_last_n.
PENALTY_LAST_N = 64
# llama.h: LLAMA_DEFAULT_SEED, which makes llama.cpp choose a random seed.
_RANDOM_SEED = 0xFFFFFFFF
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; the defaults are those of llama.cpp's tools (common_params_sampling).

    temperature: 0 always takes the most probable token. top_k: 0 keeps every token. top_p: 1 and min_p: 0 turn these filters
    off. repeat_penalty: 1 means none; it looks back over 64 tokens, including the prompt's. seed: None means a new one for each
    answer; with a number, the same conversation gets the same answer. frequency_penalty, presence_penalty: OpenAI's, from -2
    to 2, over the same 64 tokens. Raises YarnEdgeError that names the flag, the value and the range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        _check("--temperature", self.temperature, 0, math.inf)
        _check("--top-k", self.top_k, 0, _INT32_MAX, whole=True)
        _check("--top-p", self.top_p, 0, 1)
        _check("--min-p", self.min_p, 0, 1)
        _check("--repeat-penalty", self.repeat_penalty, 0, math.inf)
        if self.repeat_penalty == 0:
            raise YarnEdgeError("--repeat-penalty is 0, must be above 0 (1 means no penalty)")
        _check("frequency_penalty", self.frequency_penalty, -2, 2)
        _check("presence_penalty", self.presence_penalty, -2, 2)
        if self.seed is not None:
            _check("--seed", self.seed, 0, _RANDOM_SEED - 1, whole=True)

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on."""
        return self.repeat_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @contextmanager
    def chain(self, model: Model, prompt: Sequence[int] = ()) -> Iterator[Any]:
        """Yield the llama_sampler chain for one answer, for `Context.sample`; it is freed afterwards.

        None means simply the most probable token. prompt: the tokens before the answer, for the penalties.
        """
        if self.temperature == 0 and not self.penalizes:
            yield None
            return
        api = model.api
        params = api.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = api.llama_sampler_chain_init(params)
        try:
            for sampler in self._samplers(model):
                api.llama_sampler_chain_add(chain, sampler)  # the chain owns it now
            if self.penalizes:
                for token in prompt[-PENALTY_LAST_N:]:
                    api.llama_sampler_accept(chain, token)
            yield chain
        finally:
            api.llama_sampler_free(chain)

    def _samplers(self, model: Model) -> Iterator[Any]:
        api = model.api
        if self.penalizes:
            yield api.llama_sampler_init_penalties(
                model.n_vocab, PENALTY_LAST_N, self.repeat_penalty, self.frequency_penalty, self.presence_penalty
            )
        if self.temperature == 0:
            yield api.llama_sampler_init_greedy()
            return
        if self.top_k:
            yield api.llama_sampler_init_top_k(self.top_k)
        if self.top_p < 1:
            yield api.llama_sampler_init_top_p(self.top_p, 1)
        if self.min_p > 0:
            yield api.llama_sampler_init_min_p(self.min_p, 1)
        yield api.llama_sampler_init_temp(self.temperature)
        yield api.llama_sampler_init_dist(secrets.randbelow(_RANDOM_SEED) if self.seed is None else self.seed)


def _check(flag: str, value: float, low: float, high: float, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not math.isfinite(value):
        raise YarnEdgeError(f"{flag} is {value!r}, not a {'whole' if whole else 'finite'} number")
    if not low <= value <= high:
        raise YarnEdgeError(f"{flag} is {value!r}, must be from {low} {'up' if math.isinf(high) else f'to {high}'}")
