"""`yarn-edge verify`: does this GGUF run the positions that were fine-tuned? Each check is a number and its limit.

metadata    the file's keys agree with its own description, with what llama.cpp runs, and with the checkpoint
kernel      ggml's rope kernel on each requested backend against the float64 reference, up to the end of the context
live-graph  every layer's ROPE nodes in a real evaluation: parameters, and outputs against the reference on the actual inputs
tokenizer   token ids against the checkpoint's tokenizer
ends        where answers end, against the checkpoint's files
bos         the token before texts, against the checkpoint's tokenizer
template    the chat template, against the checkpoint's
logits      next-token distributions against transformers in float32
effect      perplexity of a text with the scaling against without it (--effect TEXT)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from yarn_edge.checkpoint.config_file import find_adapter, read_config
from yarn_edge.checkpoint.dialects import text_section
from yarn_edge.checkpoint.read import read_positions, table_parts
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import (
    BACKENDS,
    NO_OVERRIDES,
    READING_FLAG,
    ScalingOverrides,
    add_kv_flags,
    add_scaling_flags,
    add_threads_flag,
    add_trust_flag,
    length_from,
    scaling_overrides,
)
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.frequency_tables import judged_contexts
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.llama_rules.structure import other_structure
from yarn_edge.memory.splitting import split_place
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.devices import devices_of, missing
from yarn_edge.runtime.ggml import Device
from yarn_edge.runtime.kv_cache import with_kv_parts
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.model import Model
from yarn_edge.split_flags import SplitRequest, add_split_flags, split_request
from yarn_edge.stdout import write_json, write_text
from yarn_edge.verify.checks import (
    CHECKPOINT,
    Check,
    check_kernel,
    check_live_graph,
    check_metadata,
    on_backend,
    skipped,
)
from yarn_edge.verify.effect import check_effect
from yarn_edge.verify.logits import LOGIT_TOKENS, check_logits, checkpoint_scaling
from yarn_edge.verify.transformers_reference import check_reference
from yarn_edge.verify.vocabulary import VOCABULARY_CHECKS, vocabulary_checks


@dataclass(frozen=True)
class _Goal:
    """What a file's positions are to be, in layers with full attention and in those with a sliding window if that differs."""

    positions: FilePositions
    full: RopeScaling
    sliding: RopeScaling | None

    def told(self, check: Check) -> Check:
        """The check with the size of the context that it is about, if that decides about positions."""
        n_ctx = self.positions.n_ctx
        return check if n_ctx is None else replace(check, detail=f"in a context of {n_ctx} tokens: {check.detail}")


def _goals(
    file: GGUFFile, against: str | Path | None, overrides: ScalingOverrides
) -> tuple[list[_Goal], RopeScaling | None]:
    """(what to check, by size of the context if that decides; the scaling that transformers must be given, if any)."""
    sides = [FilePositions(file, n_ctx) for n_ctx in judged_contexts(file)]
    tables = None if against is None else table_parts(read_positions(read_config(Path(against)), overrides).parts)
    if len(sides) > 1 and (against is None or tables is not None):
        full = tables or [side.wanted for side in sides]
        longest = tables[1].original_context if tables else file.required_int("context_length")
        pairs = zip(sides, full, strict=True)
        return [_Goal(side, replace(table, original_context=longest), None) for side, table in pairs], None
    if against is None:
        return [_Goal(side, side.wanted, side.canonical_sliding) for side in sides], None
    goal, sliding, replaced = checkpoint_scaling(Path(against), overrides)
    return [_Goal(side, goal, sliding) for side in sides], replaced


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    overrides: ScalingOverrides = NO_OVERRIDES,
    n_tokens: int = LOGIT_TOKENS,
    threads: int | None = None,
    backend: str | SplitRequest = "cpu",
    kv_type: str = "f32",
    on_check: Callable[[Check], None] = lambda _check: None,
) -> list[Check]:
    """Run every check, and pass each result to `on_check` as soon as it is known.

    against: the checkpoint folder. backend: a key of BACKENDS, or "all"; a missing one is skipped, never replaced; or where the
    layers go: then the kernel is checked on each of these devices. overrides: the flags that convert was given. n_tokens, kv_type: of
    the logits check.
    Raises YarnEdgeError for a file that cannot be judged at all (not a GGUF, an architecture outside the table).
    """
    file = read_gguf(path)
    check_loadable(file)
    honoured(file.architecture)
    goals, replaced = _goals(file, against, overrides)
    others = [] if against is None else [*other_structure(file, text_section(read_config(Path(against))))]
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        on_check(check)

    source = CHECKPOINT if against else "the file's own description"
    for goal in goals:
        add(goal.told(check_metadata(goal.positions, goal.full, source, others)))
    if against is not None and find_adapter(Path(against)) is None:
        check_reference(Path(against), replaced)
    for name, where, why in _places(path, file, backend):
        if where is None:
            for what in ("kernel", "live-graph", "logits"):
                add(skipped(on_backend(what, name), why))
            continue
        for goal in goals:
            for check in _kernel_checks(goal, file.architecture, name, where):
                add(check)
        with Model(path, device=where, gguf=file) as model:
            for goal in goals:
                live = check_live_graph(model, goal.full, threads, name, goal.sliding, goal.positions.n_ctx)
                add(goal.told(live))
            if against is None:
                for what in (*VOCABULARY_CHECKS, "logits"):
                    add(skipped(on_backend(what, name), "needs --against CHECKPOINT"))
                continue
            for check in vocabulary_checks(model, Path(against)):
                add(check)
            add(check_logits(model, Path(against), replaced, n_tokens, threads, kv_type=kv_type, backend=name))
    return checks


def _kernel_checks(goal: _Goal, architecture: str, name: str, where: Device | LayerSplit) -> Iterator[Check]:
    """The kernel on every device of a backend, or of a split, whose checks have the devices' names."""
    runs = goal.positions.runs
    # The kernel is checked on what runs; whether that is the goal is for the other checks.
    reference = runs if angle_error(runs, goal.full).any_difference else goal.full
    split = isinstance(where, LayerSplit)
    for device in where.devices if isinstance(where, LayerSplit) else devices_of(name):
        yield goal.told(check_kernel(runs, reference, architecture, device, device.name.lower() if split else name))


def _places(
    path: str | Path, file: GGUFFile, backend: str | SplitRequest
) -> Iterator[tuple[str, Device | LayerSplit | None, str]]:
    """(name, where to run, "") of each backend, or of the split; (name, None, the reason) where there is no device."""
    if isinstance(backend, SplitRequest):
        yield "split", split_place(backend, Path(path), gguf=file).split, ""
        return
    for name in BACKENDS if backend == "all" else (backend,):
        devices = devices_of(name)
        yield name, devices[0] if devices else None, "" if devices else missing(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge verify`."""
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--against",
        metavar="CHECKPOINT",
        help="compare with the config, tokenizer, chat template and logits of the source checkpoint folder",
    )
    parser.add_argument(
        "--tokens",
        type=length_from(2, 4096),
        default=LOGIT_TOKENS,
        metavar="N",
        help="number of tokens on which to compare logits (default: %(default)s)",
    )
    parser.add_argument(
        "--effect",
        type=Path,
        metavar="TEXT",
        help="also measure how well the model predicts a text with its scaling and without it",
    )
    parser.add_argument(
        "--effect-ctx",
        type=length_from(256),
        metavar="N",
        help="tokens of that text (default: twice the original context, at most the extended one)",
    )
    parser.add_argument(
        "--backend",
        choices=(*BACKENDS, "all"),
        default="cpu",
        help="where to run the kernel, live-graph and logits checks (default: %(default)s)",
    )
    add_split_flags(parser)
    add_kv_flags(parser, "the cache for the logits check", "f32")
    add_threads_flag(parser)
    add_trust_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_scaling_flags(parser, "the scaling flags that convert was given, if any")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge verify`: returns 0 if nothing failed, 1 otherwise and if nothing could be run at all."""
    overrides = scaling_overrides(args)
    if args.against is None and overrides:
        raise YarnEdgeError(
            f"the --yarn-… flags, --freeze-at and {READING_FLAG} describe how CHECKPOINT was converted: they need --against"
        )
    split = split_request(args)
    if split and args.backend != "cpu":
        raise YarnEdgeError(
            f"--backend {args.backend} checks whole models on one device: leave it out, or --rpc and --layers-on"
        )
    if split and args.effect is not None:
        raise YarnEdgeError("--effect measures on one device: leave it out, or --rpc and --layers-on")
    if args.effect is None and args.effect_ctx is not None:
        raise YarnEdgeError("--effect-ctx needs --effect TEXT")
    on_check: Callable[[Check], None] = (lambda _check: None) if args.json else print_check
    with np.errstate(all="ignore"):  # with broken weights checks fail, and NumPy's warnings add nothing
        checks = verify(
            args.model,
            args.against,
            overrides=overrides,
            n_tokens=args.tokens,
            threads=args.threads,
            backend=split or args.backend,
            kv_type=with_kv_parts(args.kv_type, args.kv_k, args.kv_v),
            on_check=on_check,
        )
        if args.effect is not None:
            backend = "cpu" if args.backend == "all" else args.backend
            checks.append(check_effect(args.model, args.effect, args.effect_ctx, args.threads, backend))
            on_check(checks[-1])
    nothing_ran = all(c.status == "skip" for c in checks if c.name != "metadata")
    ok = not nothing_ran and all(check.status != "fail" for check in checks)
    if args.json:
        write_json({"ok": ok, "model": args.model, "checks": [asdict(c) for c in checks]}, need_reader=False)
    else:
        show_tables(checks)
    return 0 if ok else 1


def _out(text: str) -> None:
    """A reader that left (`| head`) does not change the verdict."""
    write_text(text, need_reader=False)


def print_check(check: Check) -> None:
    """One check as a line on stdout."""
    width = 11 if ":" not in check.name else 17
    number = "" if check.value is None else f"{check.value:.3g} (limit {check.limit:.3g})"
    _out(f"{check.status:<5} {check.name:<{width}} {number:<24} {one_line(check.detail, 4000)}\n")


def show_tables(checks: list[Check]) -> None:
    """The data behind the numbers: phase error by position, divergence by position."""
    out = _out
    for check in checks:
        rows = check.data.get("phase")
        if rows:
            out(f"\n{check.name} on {check.data['device']}: worst phase error in radians up to a position\n")
            out(f"{'position':>10} {'ggml':>10} {'float32*':>10} {'budget':>10}\n")
            for row in rows:
                out(f"{row['up_to']:>10} {row['ggml']:>10.1e} {row['transformers']:>10.1e} {row['budget']:>10.1e}\n")
            out("* the float32 arithmetic of transformers\n")
        buckets = check.data.get("buckets")
        if buckets:
            out(f"\n{check.name}: KL divergence (nats) by position, {check.data['kv_type']} cache\n")
            out(f"{'positions':>14} {'mean':>10} {'max':>10} {'top-1':>8}\n")
            for b in buckets:
                out(f"{b['start']:>7}-{b['end'] - 1:<6} {b['kl_mean']:>10.1e} {b['kl_max']:>10.1e} {b['top1']:>8.1%}\n")
