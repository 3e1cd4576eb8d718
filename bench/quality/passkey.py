"""`yarn-edge passkey`: does a model find a number that is hidden in a long text? By length and by depth.

The retrieval test of the YaRN paper (4.3.2, B.2), and the same test in real text (a needle in a haystack). A model whose positions
are right can still be unable to use them at a distance: perplexity hardly shows that, this test does.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.flags import count, lengths
from yarn_edge.jobs.crew import add_job_flags, crew_of
from yarn_edge.progress import note
from yarn_edge.report.deliver import add_output_flags, check_outputs, deliver
from yarn_edge.report.ticks import token_count
from yarn_edge.runtime.kv_cache import check_room
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.text_file import read_text

from ..scoring.evaluate import batch_settings, variant_context
from .on_workers import planning_model
from .passkey_outcome import TITLES, RetrievalOutcome
from .prompts_on_workers import RetrievalOn
from .retrieval import Retrieval, cells_of
from .retrieval_prompts import Kind, Needle, Passkey, Prompt, draw_secrets, make_prompts, midpoints
from .text_settings import add_running_flags, given_variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge passkey`."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL.gguf",
        help="a GGUF, or a GGUF with another cache or scaling: MODEL.gguf@kv=q8_0,yarn-factor=2",
    )
    add(
        "--lengths",
        type=lengths,
        default=[2048, 4096, 8192],
        metavar="LIST",
        help="tokens of prompt and answer together: 2k,4k,8k, or from:to:step as in 2k:16k:2k (default: 2k,4k,8k)",
    )
    places = parser.add_mutually_exclusive_group()
    places.add_argument(
        "--depths",
        type=count(1, 1000),
        default=10,
        metavar="N",
        help="hide the number in the middle of each of N equal parts of the text "
        "(default: 10, at depths of 5 %%, 15 %%, …, 95 %%)",
    )
    places.add_argument(
        "--random", type=count(1, 1000), metavar="N", help="hide the number at N random depths, as in the paper"
    )
    add(
        "--trials",
        type=count(1, 1000),
        default=1,
        metavar="N",
        help="different numbers to hide at each length and depth (default: %(default)s)",
    )
    add(
        "--seed",
        type=count(0, 2**63 - 1),
        default=0,
        metavar="N",
        help="seed of the hidden numbers and the random depths (default: %(default)s)",
    )
    add(
        "--variant",
        choices=tuple(TITLES),
        default="passkey",
        help="passkey: the paper's test, in sentences that repeat; needle: one sentence in real text (default: %(default)s)",
    )
    add("--text", metavar="FILE", help="UTF-8 text for --variant needle (default: the bundled text)")
    add_running_flags(parser)
    add_job_flags(parser, "prompts")
    add_output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge passkey`. However the run ends, what was measured is reported first, then the failure."""
    check_outputs(args)
    crew = crew_of(args)
    if args.text is not None and args.variant != "needle":
        raise YarnEdgeError("--text is the text that a needle is hidden in: it needs --variant needle")
    kind: Kind = Passkey()
    if args.variant == "needle":
        kind = Needle(sample_text() if args.text is None else read_text(Path(args.text)))
    variant = given_variant(args, args.model)
    with ExitStack() as stack:
        model = stack.enter_context(variant.load() if crew is None else planning_model(variant))
        longest = max(args.lengths)
        test_of: Callable[[Sequence[Prompt]], Retrieval | RetrievalOn]
        if crew is None:  # before prompts are made, which may be as long as no memory is
            opened = variant_context(model, variant, longest, args.threads, args.attention)
            test_of = partial(Retrieval, stack.enter_context(opened))
        else:
            check_room(model.gguf, longest, variant.kv_type)
            batch = batch_settings(model.gguf, model.n_vocab, variant, longest, crew.threads, args.attention)
            test_of = partial(RetrievalOn, crew, variant, batch)
        declared = model.n_ctx_train
        beyond = [token_count(n) for n in args.lengths if n > declared]
        if beyond:
            note(f"{variant.label}: its context is {token_count(declared)} tokens: {', '.join(beyond)} lie beyond it")
        depths, prompts = _prompts(model, kind, args)
        test = test_of(prompts)
        ended: BaseException | None = None
        try:
            test.go()
        except (KeyboardInterrupt, Terminated, YarnEdgeError) as reason:
            if not any(answer is not None for answer in test.answers):
                raise
            ended = reason
    outcome = RetrievalOutcome(
        model=variant.label,
        kind=args.variant,
        seed=args.seed,
        lengths=args.lengths,
        depths=depths,
        declared=declared,
        n_prompts=len(prompts),
        cells=cells_of(prompts, test.answers),
        tok_per_s=test.tok_per_s,
    )
    deliver(args, outcome.as_json(), outcome.report(), [variant.path])
    if ended is not None:
        raise ended
    return 0


def _prompts(model: Model, kind: Kind, args: argparse.Namespace) -> tuple[list[float], list[Prompt]]:
    """The depths, ascending, and the prompts: the same depths and numbers at every length."""
    source = random.Random(args.seed)
    depths = sorted(source.random() for _ in range(args.random)) if args.random else midpoints(args.depths)
    return depths, make_prompts(model, kind, args.lengths, depths, draw_secrets(kind, source, len(depths), args.trials))
