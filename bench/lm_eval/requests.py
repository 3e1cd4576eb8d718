"""Scores and generates one request after another. Each reuses what the KV cache still holds of the one before.

`in_order` sorts requests with a common prompt next to each other: of four answers to one question only the answers are evaluated, and
of questions after the same few-shot prompt only the questions.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.likelihood import Float32, Rows
from yarn_edge.runtime.context import Context
from yarn_edge.signals import deferred_ctrl_c

Tokens = npt.NDArray[np.int32]

# Rows of logits that are kept of the last request. Answers to one question differ in their first tokens, whose rows need not be
# evaluated again; answers of one token, as in MMLU, need no evaluation at all.
KEPT_ROWS = 16


def in_order(sequences: Sequence[Tokens]) -> list[int]:
    """The indices of `sequences`, sorted so that common beginnings are next to each other, the shorter sequence first."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].tobytes())


def common_prefix(one: Tokens, other: Tokens) -> int:
    """The number of tokens that both begin with."""
    n = min(len(one), len(other))
    different = np.flatnonzero(one[:n] != other[:n])
    return int(different[0]) if len(different) else n


class Requests:
    """Answers requests in a context that nothing else uses. n_given: tokens of all inputs; n_evaluated: those that were evaluated."""

    def __init__(self, context: Context, rows: Rows) -> None:
        self.context, self._rows = context, rows
        self.n_given = self.n_evaluated = 0
        self._held: Tokens = np.empty(0, np.int32)  # tokens whose keys and values are certainly in the cache
        self._kept: list[Float32] = []  # logits after the held tokens at _kept_from, _kept_from + 1, …
        self._kept_from = 0
        meta = context.model.gguf.metadata
        spm = meta.get("tokenizer.ggml.model") == "llama"
        self._space_in_front = spm and bool(meta.get("tokenizer.ggml.add_space_prefix", True))

    def score(self, tokens: Tokens, n_scored: int) -> tuple[float, bool]:
        """Score the last `n_scored` tokens, each given all before it: (sum of log-probabilities in nats, all are the most probable).

        All but the last token must fit into the context. Raises YarnEdgeError if the logits are not numbers.
        """
        inputs, first = tokens[:-1], len(tokens) - 1 - n_scored
        self._forget_if_recurrent()
        common = common_prefix(self._held, inputs)
        known = self._known(first, common)
        at = first + len(known) if known else min(first, common)
        judged = [self._judge(np.stack(known), tokens[first + 1 : at + 1])] if known else []
        self.n_given += len(inputs)
        if at < len(inputs):
            self._cut(at)
            if not known:
                self._kept, self._kept_from = [], first
            for start in range(at, len(inputs), self.context.n_batch):
                part = inputs[start : start + self.context.n_batch]
                end = start + len(part)
                n_rows = max(0, end - max(start, first))
                self._evaluate(part, start, n_rows)
                self._held = inputs[:end]
                if n_rows:
                    logits = self.context.logits_in_place()
                    judged.append(self._judge(logits, tokens[end - n_rows + 1 : end + 1]))
                    self._kept += list(logits[: max(0, KEPT_ROWS - len(self._kept))].copy())
        return sum(log_prob for log_prob, _ in judged), all(greedy for _, greedy in judged)

    def _known(self, first: int, common: int) -> list[Float32]:
        """Rows of logits from position `first` on that the previous request left, as far as both requests are the same."""
        if first < self._kept_from:
            return []
        return self._kept[first - self._kept_from : max(0, common - self._kept_from)]

    def _judge(self, logits: Float32, targets: Tokens) -> tuple[float, bool]:
        log_z = self._rows.log_normalizers(logits)
        log_probs = np.take_along_axis(logits, targets[:, None].astype(np.int64), axis=1)[:, 0] - log_z
        if not np.isfinite(log_z).all() or np.isnan(log_probs).any():
            raise YarnEdgeError(f"{self.context.model.path}: the logits are not numbers (NaN or infinite)")
        return float(log_probs.sum()), bool((logits.argmax(axis=1) == targets).all())

    def generate(self, prompt: Tokens, sampling: Sampling, max_tokens: int, stops: Sequence[str]) -> str:
        """Continue `prompt` up to the first of `stops`, the model's own end, or `max_tokens`.

        Prompt and answer must fit into the context together. A character that max_tokens cuts is left out. If the tokenizer adds a
        space before every text, the one before the answer is removed, as in transformers' decode.
        """
        model = self.context.model
        self._forget_if_recurrent()
        at = min(common_prefix(self._held, prompt), len(prompt) - 1)
        self.n_given += len(prompt)
        self._cut(at)
        self._kept = []
        for start in range(at, len(prompt), self.context.n_batch):
            part = prompt[start : start + self.context.n_batch]
            self._evaluate(part, start, int(start + len(part) == len(prompt)))
            self._held = prompt[: start + len(part)]
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text, ended = "", False
        answer: list[int] = []
        longest = max(map(len, stops), default=0)
        with sampling.chain(model) as chain:
            while not ended:
                token = self.context.sample(chain)
                ended = model.is_end(token)
                seen = max(0, len(text) - longest + 1)
                text += decoder.decode(b"" if ended else model.token_bytes(token, special=False), final=ended)
                if not answer and self._space_in_front:
                    text = text.removeprefix(" ")
                stop = min((i for i in (text.find(s, seen) for s in stops) if i >= 0), default=None)
                if stop is not None:
                    text, ended = text[:stop], True
                answer.append(token)
                ended = ended or len(answer) == max_tokens
                if not ended:
                    self._evaluate(np.array([token], np.int32), len(prompt) + len(answer) - 1, 1)
        self._held = np.concatenate([prompt, np.array(answer[:-1], np.int32)])
        return text

    def forget(self) -> None:
        """Empty the cache: the next request is evaluated whole."""
        self._cut(0)

    def _forget_if_recurrent(self) -> None:
        """The state of linear attention cannot be cut, so that such models read every request whole."""
        if self.context.model.recurrent:
            self.forget()

    def _evaluate(self, part: Tokens, start: int, n_rows: int) -> None:
        with self.context.interruptible() as interrupt, deferred_ctrl_c(interrupt):
            self.context.evaluate(part.tolist(), start, n_rows)
        self.n_evaluated += len(part)

    def _cut(self, n_tokens: int) -> None:
        """Keep only the first `n_tokens` and their logits."""
        self.context.keep(n_tokens)
        self._held = self._held[:n_tokens]
        del self._kept[max(0, n_tokens - self._kept_from) :]
