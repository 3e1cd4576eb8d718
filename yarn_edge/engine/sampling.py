"""How the next token is chosen: llama.cpp's own samplers, chained in the order that its tools use.

`Sampling` is the description, a frozen value that is checked on creation; `Sampling.chain` is the native chain for one answer.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from yarn_edge.engine.constrained import ConstrainedSampler
from yarn_edge.engine.constraint import Constraint
from yarn_edge.errors import YarnEdgeError

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

# llama.cpp common/common.h, common_params_sampling: penalty_last_n.
PENALTY_LAST_N = 64
# llama.h: LLAMA_DEFAULT_SEED, which makes llama.cpp choose a random seed.
_RANDOM_SEED = 0xFFFFFFFF
_INT32_MAX = 2**31 - 1
MAX_SEED = _RANDOM_SEED - 1
# field -> (its name in messages: the flag of chat, if there is one; lowest, highest value; whether it is a whole number)
_RANGES: dict[str, tuple[str, float, float, bool]] = {
    "temperature": ("--temperature", 0, math.inf, False),
    "top_k": ("--top-k", 0, _INT32_MAX, True),
    "top_p": ("--top-p", 0, 1, False),
    "min_p": ("--min-p", 0, 1, False),
    "repeat_penalty": ("--repeat-penalty", 0, math.inf, False),
    "frequency_penalty": ("frequency_penalty", -2, 2, False),
    "presence_penalty": ("presence_penalty", -2, 2, False),
    "seed": ("--seed", 0, MAX_SEED, True),
}
_NAMES = {field: row[0] for field, row in _RANGES.items()}


class SamplingError(YarnEdgeError):
    """A sampling parameter out of range, named by its flag. field, fact: the same for those who know it by another name."""

    def __init__(self, field: str, fact: str) -> None:
        super().__init__(f"{_NAMES.get(field, field)} {fact}")
        self.field, self.fact = field, fact


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters; the defaults are those of llama.cpp's tools (common_params_sampling).

    temperature: 0 always takes the most probable token. top_k: 0 keeps every token. top_p: 1 and min_p: 0 turn these filters
    off. repeat_penalty: 1 means none; it looks back over 64 tokens, including the prompt's. seed: None means a new one for each
    answer; with a number, the same conversation gets the same answer. frequency_penalty, presence_penalty: OpenAI's, from -2
    to 2, over the same 64 tokens. constraint: the form of the answer. logit_bias: (token, what is added to its logit); -inf forbids
    it. Raises SamplingError that names the flag, the value and the range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    constraint: Constraint | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for field in _RANGES:
            if field != "seed" or self.seed is not None:
                _check(field, getattr(self, field))
        if self.repeat_penalty == 0:
            raise SamplingError("repeat_penalty", "is 0, must be above 0 (1 means no penalty)")
        if any(math.isnan(bias) or bias == math.inf for _token, bias in self.logit_bias):
            raise SamplingError("logit_bias", "has a value that is not a number, or infinite")

    @property
    def penalizes(self) -> bool:
        """Whether any penalty is on."""
        return self.repeat_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @contextmanager
    def chain(self, model: Model, prompt: Sequence[int] = ()) -> Iterator[Any]:
        """Yield the llama_sampler chain for one answer, for `Context.sample`; it is freed afterwards.

        None means simply the most probable token. prompt: the tokens before the answer, for the penalties. Raises YarnEdgeError
        if the answer cannot be held to the constraint: at the beginning, or at the end of an answer that ended for that reason.
        """
        if self.temperature == 0 and not self.penalizes and self.constraint is None and not self.logit_bias:
            yield None
            return
        api = model.api
        params = api.llama_sampler_chain_default_params()
        params.no_perf = True
        chain = api.llama_sampler_chain_init(params)
        with ExitStack() as open_until_end:
            open_until_end.callback(api.llama_sampler_free, chain)
            held = None
            if self.constraint is not None:
                most = 1 if self.temperature == 0 else self.top_k or None
                held = ConstrainedSampler(model, self.constraint, most)
                open_until_end.callback(held.close)
            for sampler in self._samplers(model, prompt, held):
                api.llama_sampler_chain_add(chain, sampler)  # the chain owns it now
            yield chain
            if held is not None and held.failure is not None:
                raise YarnEdgeError(held.failure)

    def _samplers(self, model: Model, prompt: Sequence[int], held: ConstrainedSampler | None) -> Iterator[Any]:
        api = model.api
        if self.logit_bias:
            biases = (api.llama_logit_bias * len(self.logit_bias))()
            for item, (token, bias) in zip(biases, self.logit_bias, strict=True):
                if not 0 <= token < model.n_vocab:
                    raise SamplingError("logit_bias", f"names token {token}, the vocabulary has {model.n_vocab}")
                item.token, item.bias = token, bias
            yield api.llama_sampler_init_logit_bias(model.n_vocab, len(biases), biases)
        if self.penalizes:
            penalties = api.llama_sampler_init_penalties(
                model.n_vocab, PENALTY_LAST_N, self.repeat_penalty, self.frequency_penalty, self.presence_penalty
            )
            for token in prompt[-PENALTY_LAST_N:]:
                api.llama_sampler_accept(penalties, token)
            yield penalties
        if held is not None:
            yield held.sampler()
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


def _check(field: str, value: object) -> None:
    _name, low, high, whole = _RANGES[field]
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        raise SamplingError(field, f"is {value!r}, not a {'whole' if whole else 'finite'} number")
    if not low <= value <= high:  # type: ignore[operator]
        raise SamplingError(field, f"is {value!r}, must be from {low} {'up' if math.isinf(high) else f'to {high}'}")
