"""`yarn-edge verify`: does this GGUF run the positions that were fine-tuned? Each check is a number and its limit.

metadata    the file's keys say the same as its own description, as llama.cpp's rules, and as the checkpoint
kernel      ggml's rope kernel against the float64 reference, up to the end of the context
live-graph  every layer's ROPE nodes in a real evaluation: parameters, and outputs against the reference on actual inputs
tokenizer   token ids against the checkpoint's tokenizer
logits      next-token distributions against transformers in float32
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from yarn_edge import ggml, metadata
from yarn_edge.config_file import read_config
from yarn_edge.config_scaling import read_scaling
from yarn_edge.dialects import recognise
from yarn_edge.effective import angle_error, effective
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_scaling_flags, add_threads_flag, count, scaling_overrides
from yarn_edge.gguf_file import GGUFFile, read_gguf
from yarn_edge.hf_reference import divergence, merge, reference_logits, rope_parameters
from yarn_edge.honoured import honoured
from yarn_edge.loadable import check_loadable
from yarn_edge.phase import rotation_error
from yarn_edge.progress import bar
from yarn_edge.runtime import Context, Model
from yarn_edge.sample_text import sample_text
from yarn_edge.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.tap import RopeNode, record_ropes

Status = Literal["pass", "fail", "skip"]
LONGEST_POSITION = 131071
LIVE_TOKENS = 16
LOGIT_TOKENS = 768
LOGIT_BATCH = 128
# general.file_type (llama.h: enum llama_ftype) -> the largest mean KL in nats that the type itself explains: rounding for
# F32, at least twice what SmolLM2-135M shows for the others (docs/verify.md). Larger models lose less.
KL_LIMITS = {0: 1e-8, 1: 1e-4, 32: 1e-3, 7: 1.5e-2, 18: 4e-2, 8: 0.35, 9: 0.35, 14: 0.35, 15: 0.35, 16: 0.35, 17: 0.35}
KL_LIMIT_OTHERS = 1.3


@dataclass(frozen=True)
class Check:
    """One check: its number, the limit it must not exceed (both None where it was skipped), and what they mean."""

    name: str
    status: Status
    value: float | None
    limit: float | None
    detail: str


def _judge(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(name, "pass" if value <= limit else "fail", value, limit, detail)


def check_metadata(file: GGUFFile, goal: RopeScaling, goal_name: str) -> Check:
    """The declared keys, llama.cpp's reading of them, the canonical description and the context length, against `goal`."""
    sides: dict[str, RopeScaling | None] = {
        "the rope keys": metadata.declared(file),
        "llama.cpp's reading of them": effective(file),
        "yarn_edge.rope.*": metadata.canonical(file),
    }
    worst, told = 0.0, []
    for side, scaling in sides.items():
        if scaling is None:
            continue
        error = angle_error(scaling, goal)
        worst = max(worst, error.frequency, error.attention)
        differing = goal.differences(scaling) if error.any_difference or side != "llama.cpp's reading of them" else {}
        if differing and not error.any_difference:
            worst = max(worst, 1.0)  # other words for other angles at another length: not what was written
        told += [f"{side}: {n} is {b!r}, {goal_name} says {a!r}" for n, (a, b) in sorted(differing.items())]
    context = file.required_int("context_length")
    if context != goal.extended_context:
        worst = max(worst, 1.0)
        told.append(f"context_length is {context}, {goal_name} makes it {goal.extended_context}")
    return _judge("metadata", worst, SAME_RELATIVE, "; ".join(told) or f"the keys say what {goal_name} says")


def check_kernel(goal: RopeScaling, architecture: str) -> Check:
    """ggml's CPU rope kernel against the reference at positions across the context and at 131071."""
    pairing = honoured(architecture).pairing
    last = max(LONGEST_POSITION, goal.extended_context - 1)
    positions = np.unique(np.append(np.geomspace(1, last, 48).astype(np.int32), [0, goal.original_context, last]))
    x = np.random.default_rng(0).standard_normal((len(positions), 4, goal.dim)).astype(np.float32)
    try:
        y = ggml.rope(x, positions, ggml.rope_arguments(goal, pairing))
    except YarnEdgeError as refusal:
        return Check("kernel", "fail", float("inf"), 1.0, str(refusal))
    error = rotation_error(x, y, positions, goal, pairing)
    return _judge("kernel", error.of_budget, 1.0, f"CPU: worst {error}")


def check_live_graph(model: Model, goal: RopeScaling, threads: int | None = None) -> Check:
    """Every layer's ROPE nodes, in windows at the start, around the original context and at the end of the extended one."""
    file = model.gguf
    pairing = honoured(file.architecture).pairing
    starts = sorted({0, max(0, goal.original_context - LIVE_TOKENS // 2), max(0, goal.extended_context - LIVE_TOKENS)})
    tokens = model.tokenize(sample_text()[:400], add_special=False, parse_special=False)[:LIVE_TOKENS]
    nodes = record_ropes(model, tokens, starts, threads=threads)
    told = _missing_layers(nodes, model.n_layer, len(starts))
    for name, scaling in (("wanted", goal), ("declared", metadata.declared(file))):
        try:
            told += _wrong_parameters(nodes, ggml.rope_arguments(scaling, pairing), name)
        except YarnEdgeError as error:
            told.append(f"{name}: {error}")
    told += [f"{n.name} has frequency factors" for n in nodes if n.factors is not None][:1]
    if any(n.arguments.n_dims != goal.dim or n.x.shape[-1] < goal.dim for n in nodes):
        return Check("live-graph", "fail", float("inf"), 1.0, "; ".join(told))
    worst = max((rotation_error(n.x, n.y, n.positions, goal, pairing) for n in nodes), key=lambda e: e.of_budget)
    value = max(worst.of_budget, float("inf") if told else 0.0)
    detail = f"{len(nodes)} nodes at positions from {', '.join(map(str, starts))}: worst {worst}"
    return _judge("live-graph", value, 1.0, "; ".join([*told, detail]))


def _missing_layers(nodes: list[RopeNode], n_layer: int, n_starts: int) -> list[str]:
    for layer in range(n_layer):
        seen = sum(1 for n in nodes if n.layer == layer)
        if seen != 2 * n_starts:
            return [f"layer {layer} has {seen} ROPE nodes, expected {2 * n_starts}"]
    return []


def _wrong_parameters(nodes: list[RopeNode], expected: ggml.RopeArguments, name: str) -> list[str]:
    """The parameters in which a node differs from what was wanted or declared, each told once."""
    told: dict[str, str] = {}
    ramped = expected.ext_factor != 0
    for node in nodes:
        for field, want in asdict(expected).items():
            if not ramped and field in ("beta_fast", "beta_slow", "n_ctx_orig"):
                continue
            have = getattr(node.arguments, field)
            if abs(have - want) > SAME_RELATIVE * abs(want):
                told.setdefault(field, f"{node.name} runs {field} {have:.7g}, {name} is {want:.7g}")
    return list(told.values())


def check_tokenizer(model: Model, checkpoint: Path) -> Check:
    """Token ids of a stress text against the checkpoint's own tokenizer."""
    from yarn_edge.tokenizer_check import check_tokens, reference_encoder

    found = check_tokens(model, reference_encoder(checkpoint))
    same = f"{found.n_texts} texts, {found.n_tokens} tokens: the same ids"
    detail = "; ".join([str(found.mismatch) if found.mismatch is not None else same, *found.notes])
    return _judge("tokenizer", float(found.n_different), 0.0, detail)


def check_logits(
    model: Model, checkpoint: Path, replaced: Mapping[str, Any] | None, n_tokens: int, threads: int | None = None
) -> Check:
    """Mean KL divergence to transformers in float32, float32 KV cache, over `n_tokens` of English.

    replaced: rope parameters to give transformers in place of the checkpoint's own (see `_checkpoint_scaling`).
    """
    tokens = model.tokenize(sample_text(), add_special=model.add_bos, parse_special=False)[:n_tokens]
    n_embeddings = read_config(checkpoint).required_integer("vocab_size")
    if n_embeddings != model.n_vocab:
        detail = f"the file has {model.n_vocab} tokens, the checkpoint {n_embeddings} embeddings"
        return Check("logits", "fail", float("inf"), 0.0, detail)
    with bar("Running the checkpoint in transformers", 1):
        truth = reference_logits(checkpoint, tokens, replaced)
    parts = []
    with (
        Context(
            model, n_ctx=len(tokens), n_batch=LOGIT_BATCH, kv_type="f32", flash_attention="off", threads=threads
        ) as c,
        bar("Comparing logits", len(tokens), "tokens") as advance,
    ):
        for start in range(0, len(tokens), LOGIT_BATCH):
            c.evaluate(tokens[start : start + LOGIT_BATCH], start, "all", advance)
            parts.append(divergence(truth[start : start + LOGIT_BATCH], c.logits()))
    found = merge(parts)
    ftype = model.gguf.metadata.get("general.file_type")
    limit = KL_LIMITS.get(ftype, KL_LIMIT_OTHERS) if isinstance(ftype, int) else KL_LIMIT_OTHERS
    detail = f"mean KL (nats) over {found.n_tokens} tokens, f32 cache; max {found.kl_max:.2e}, top-1 {found.top1:.2%}"
    if replaced is not None:
        detail += "; transformers was given the scaling as yarn-edge reads it"
    return _judge("logits", found.kl_mean, limit, detail)


def _checkpoint_scaling(folder: Path, overrides: Mapping[str, Any]) -> tuple[RopeScaling, dict[str, Any] | None]:
    """(scaling, rope_parameters to give transformers where it would not read this config itself).

    transformers ignores the flags, and of the Nous code the 0.07 and attn_factor: there our own reading is given to it, and
    its logits then prove all but that reading.
    """
    config = read_config(folder)
    scaling = read_scaling(config, overrides)
    dialect = recognise(config)
    own_factor = abs(scaling.attention_factor / scaling.default_attention_factor - 1) > SAME_RELATIVE
    foreign = bool(overrides) or (dialect.attn_factor_multiplies and own_factor)
    return scaling, rope_parameters(scaling) if foreign else None


def verify(
    path: str | Path,
    against: str | Path | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    n_tokens: int = LOGIT_TOKENS,
    threads: int | None = None,
    on_check: Callable[[Check], None] = lambda _check: None,
) -> list[Check]:
    """Run every check; each result is also passed to `on_check` as soon as it is there.

    Raises YarnEdgeError for a file that cannot be judged at all (not a GGUF, an architecture outside the table).
    """
    file = read_gguf(path)
    check_loadable(file)
    honoured(file.architecture)
    goal, goal_name, replaced = metadata.wanted(file), "the file's own description", None
    if against is not None:
        goal, replaced = _checkpoint_scaling(Path(against), overrides or {})
        goal_name = "the checkpoint"
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        on_check(check)

    add(check_metadata(file, goal, goal_name))
    add(check_kernel(goal, file.architecture))
    with Model(path) as model:
        add(check_live_graph(model, goal, threads))
        if against is None:
            for name in ("tokenizer", "logits"):
                add(Check(name, "skip", None, None, "needs --against CHECKPOINT"))
        else:
            add(check_tokenizer(model, Path(against)))
            add(check_logits(model, Path(against), replaced, n_tokens, threads))
    return checks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge verify`."""
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--against", metavar="CHECKPOINT", help="the folder it was made from: its config, tokenizer, logits"
    )
    parser.add_argument(
        "--tokens",
        type=count(2, 4096),
        default=LOGIT_TOKENS,
        metavar="N",
        help="tokens to compare logits on (%(default)s)",
    )
    add_threads_flag(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_scaling_flags(parser, "the flags that convert was given, if any")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge verify`: exit code 0 when nothing failed, 1 otherwise."""
    overrides = scaling_overrides(args)
    if args.against is None and overrides:
        raise YarnEdgeError("the --yarn-… flags describe how CHECKPOINT was converted: they need --against")

    def show(check: Check) -> None:
        if not args.json:
            number = "" if check.value is None else f"{check.value:.3g} (limit {check.limit:.3g})"
            sys.stdout.write(f"{check.status:<5} {check.name:<11} {number:<24} {check.detail}\n")
            sys.stdout.flush()

    with np.errstate(all="ignore"):  # wild weights: their checks fail, the warnings tell nothing more
        checks = verify(
            args.model, args.against, overrides=overrides, n_tokens=args.tokens, threads=args.threads, on_check=show
        )
    ok = all(check.status != "fail" for check in checks)
    if args.json:
        told = [asdict(c) | {"value": c.value if c.value is None or np.isfinite(c.value) else None} for c in checks]
        sys.stdout.write(json.dumps({"ok": ok, "model": str(args.model), "checks": told}, ensure_ascii=False) + "\n")
    return 0 if ok else 1
