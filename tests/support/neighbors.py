"""The same requests alone and among others: `python -m support.neighbors MODEL.gguf --requests 200` in `tests/`.

Each request is answered by an engine that has nothing else to do, and then among others that come, go and are cancelled at random.
Some share a long beginning, also with those that are cancelled, which need not be repeatable. Exits with 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from yarn_edge.engine.answer import AnswerRequest, RunningAnswer
from yarn_edge.engine.batching import Engine
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.sampling import Sampling
from yarn_edge.memory.placement import Wanted
from yarn_edge.stdout import write_text

Answers = list[list[int]]


def requests_of(n: int, n_vocab: int, longest: int, seed: int = 0) -> list[AnswerRequest]:
    """Prompts of random tokens: half of them begin with one of three texts. Greedy, or with a seed."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(3, n_vocab, longest * 3 // 4).tolist() for _ in range(3)]
    made = []
    for i in range(n):
        own = rng.integers(3, n_vocab, int(rng.integers(1, longest // 4))).tolist()
        shared = texts[i % 3][: int(rng.integers(1, len(texts[0])))] if rng.random() < 0.5 else []
        sampling = Sampling(temperature=0) if i % 2 else Sampling(temperature=0.8, seed=i)
        made.append(AnswerRequest([*shared, *own], sampling, int(rng.integers(2, 24))))
    return made


def run(
    engine: Engine, requests: Sequence[AnswerRequest], at_once: int, cancelled: float = 0, seed: int = 0
) -> Answers:
    """The tokens of all answers, which begin at most `at_once` at a time, and with random others that are cancelled."""
    rng, model, n_ctx = np.random.default_rng(seed), engine.context.model, engine.n_ctx
    answers = [RunningAnswer(request, model, n_ctx) for request in requests]
    left, others = list(answers), []
    while left or engine.busy:
        while left and len(engine.running) + len(engine.waiting) < at_once:
            if rng.random() < cancelled:
                prompt = rng.integers(3, model.n_vocab, int(rng.integers(1, 200))).tolist()
                if rng.random() < 0.5:  # a beginning that others ask for, too
                    shared = requests[int(rng.integers(len(requests)))].tokens
                    prompt = [*shared[: int(rng.integers(1, len(shared) + 1))], *prompt[:3]]
                others.append(RunningAnswer(AnswerRequest(prompt, Sampling(), 50), model, n_ctx))
                engine.submit(others[-1])
            else:
                engine.submit(left.pop(0))
        engine.step()
        for one in [one for one in others if rng.random() < 0.1]:
            others.remove(one)
            engine.cancel(one)
    return [answer.tokens[answer.n_prompt :] for answer in answers]


def differing(one: Answers, other: Answers) -> list[int]:
    """The numbers of the answers that are not the same."""
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--longest", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ctx", type=int, default=8192)
    args = parser.parse_args()
    wanted = Wanted("cpu", args.ctx, "f16", threads=args.threads)
    with opened(args.model, wanted, EngineSettings(lookup="off", parallel=args.parallel)) as generation:
        engine = generation.engine
        requests = requests_of(args.requests, engine.context.model.n_vocab, args.longest)
        answers, took = [], []
        for at_once, cancelled, seed in ((1, 0.0, 0), (args.parallel, 0.2, 1)):
            began = time.perf_counter()
            answers.append(run(engine, requests, at_once, cancelled, seed))
            took.append(time.perf_counter() - began)
        wrong = differing(*answers)
        write_text(
            f"{len(requests)} requests: alone {took[0]:.1f} s, among others {took[1]:.1f} s; {len(wrong)} differ {wrong[:10]}\n"
        )
        write_text(f"{engine.load()}\n")
        return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
