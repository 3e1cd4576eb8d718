"""The checks of `verify` that need no checkpoint: metadata, ggml's rope kernel, the live graph. Each is a number with a limit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.declared import NOT_IN_THE_FILE, open_attention_factor
from yarn_edge.llama_rules.description import CANONICAL
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.layers import Kind, layer_kinds
from yarn_edge.llama_rules.rope_keys import in_keys, nearest_keys
from yarn_edge.positions import error_budget as phase
from yarn_edge.positions.error_budget import rotation_error
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling
from yarn_edge.runtime import ggml, rope_kernel
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.rope_nodes import RopeNode, record_ropes

Status = Literal["pass", "fail", "skip"]
LONGEST_POSITION = 131071
LIVE_TOKENS = 16
CHECKPOINT = "the checkpoint"  # in messages, where the goal comes from
KEYS, CANONICAL_KEYS = "the rope keys", f"{CANONICAL}*"


@dataclass(frozen=True)
class Check:
    """One check: its number, the limit that it must not exceed (both None if it was skipped), and what they mean.

    data: the measurements behind the number, as plain values for JSON (docs/verify.md).
    """

    name: str
    status: Status
    value: float | None
    limit: float | None
    detail: str
    data: Mapping[str, Any] = field(default_factory=dict)


def judge(name: str, value: float, limit: float, detail: str, data: Mapping[str, Any] | None = None) -> Check:
    """A check that passes if `value` <= `limit`. NaN fails."""
    return Check(name, "pass" if value <= limit else "fail", value, limit, detail, data or {})


def skipped(name: str, why: str) -> Check:
    """A check that was not run. why: the reason."""
    return Check(name, "skip", None, None, why)


def on_backend(name: str, backend: str) -> str:
    """The name of a check on a backend. The CPU is the usual case and is left out."""
    return name if backend == "cpu" else f"{name}:{backend}"


def check_metadata(positions: FilePositions, goal: RopeScaling, goal_name: str, others: Sequence[str] = ()) -> Check:
    """The declared keys, what llama.cpp runs, the file's own description and its context length, against `goal`.

    Angles are compared. Fields are compared too if both sides use the same method: another original context with the same
    angles is still not what was written. goal_name: where the goal comes from, for messages. others: faults beside positions.
    """
    file, declared, canonical = positions.file, positions.declared, positions.canonical
    sides = {"what llama.cpp runs": positions.runs}
    worst, faults, remark = 0.0, [], ""
    if positions.live is not None and canonical is not None:
        sides[CANONICAL_KEYS] = canonical
        faults += wrong_keys(file, canonical)
        worst = float(bool(faults))
    elif canonical is not None:
        sides |= {KEYS: declared, CANONICAL_KEYS: canonical}
    elif goal_name != CHECKPOINT:
        sides[KEYS] = declared
    elif angle_error(
        declared, goal
    ).any_difference:  # another converter's dead keys: with a checkpoint, what runs is judged
        remark = "; its keys, read literally, declare other positions (yarn-edge inspect shows them)"
    for side, scaling in sides.items():
        error = angle_error(scaling, goal)
        worst = max(worst, error.frequency, error.attention)
        compare_fields = side == CANONICAL_KEYS or (
            side == KEYS and scaling.method == goal.method and scaling.frequency_factors is None
        )
        differing = goal.differences(scaling) if error.any_difference or compare_fields else {}
        if differing and not error.any_difference:
            worst = max(worst, 1.0)
        for n, (a, b) in sorted(differing.items()):
            if n == "frequency_factors":
                faults.append(f"{side}: frequencies up to {error.frequency:.2%} off (pair {error.pair})")
            else:
                faults.append(f"{side}: {n} is {b!r}, {goal_name} says {a!r}")
    context = file.required_int("context_length")
    assumed = goal.method == "linear" and goal.source("original_context").startswith(NOT_IN_THE_FILE)
    if context != goal.extended_context and not assumed:
        worst = max(worst, 1.0)
        faults.append(f"context_length is {context}, {goal_name} makes it {goal.extended_context}")
    faults += others
    worst = max(worst, float(bool(others)))
    detail = "; ".join(faults) or f"the keys say what {goal_name} says"
    if angle_error(positions.effective(), goal).any_difference and not faults:
        how = "it puts into the live graph" if positions.live is not None else "it passes as runtime arguments"
        detail += f"; yarn-edge runs them by what {how}: other programs run {positions.error()}"
    open_factor = open_attention_factor(file)
    if open_factor is not None and goal_name != CHECKPOINT:
        remark += (
            f"; yarn_attn_factor is {open_factor:.7g}: if that is the model's attention_factor, A should have this value but does "
            "not; only --against CHECKPOINT can decide that"
        )
    return judge("metadata", worst, SAME_RELATIVE, detail + remark)


def wrong_keys(file: GGUFFile, goal: RopeScaling) -> list[str]:
    """The rope keys of a file in the live form that are not the nearest to `goal`, as sentences."""
    faults = []
    for key, want in nearest_keys(goal, file.architecture).items():
        have = file.metadata.get(key)
        have = tuple(have.tolist()) if isinstance(have, np.ndarray) else have
        number = isinstance(want, float) and isinstance(have, (int, float)) and not isinstance(have, bool)
        same = abs(have - want) <= SAME_RELATIVE * abs(want) if number else have == want
        if not same:
            faults.append(f"{key} is {one_line(repr(have), 60)}, the description makes it {want!r}")
    return faults


def check_kernel(
    runs: RopeScaling, goal: RopeScaling, architecture: str, device: ggml.Device | None = None, backend: str = "cpu"
) -> Check:
    """ggml's rope kernel on one device with the parameters of `runs`, which the file makes it use, against the reference of `goal`.

    Positions are spread over the context, at least up to 131071. data["phase"] has the worst error in radians up to several
    positions, for this kernel and for the float32 arithmetic of transformers. device: None for the CPU.
    """
    rules, name = honoured(architecture), on_backend("kernel", backend)
    pairing, sections = rules.pairing, rules.sections(runs.dim)
    if runs.dim != goal.dim:
        return Check(name, "fail", float("inf"), 1.0, f"{runs.dim} dimensions are rotated, {goal.dim} are wanted")
    positions = phase.sample_positions(max(LONGEST_POSITION + 1, goal.extended_context), goal.original_context)
    x = np.random.default_rng(0).standard_normal((len(positions), 1, goal.dim)).astype(np.float32)
    try:
        y = rope_kernel.rope(
            x, positions, rope_kernel.rope_arguments(runs, pairing, sections), device, runs.frequency_factors
        )
    except YarnEdgeError as refusal:
        return Check(name, "fail", float("inf"), 1.0, str(refusal))
    errors = phase.rotation_errors(x, y, positions, goal, pairing)
    worst = phase.worst(errors, positions, goal)
    table = phase.error_by_position(errors.max(axis=1), positions, goal)
    where = device.name if device else "CPU"
    return judge(
        name, worst.of_budget, 1.0, f"{where}: closest to its error budget: {worst}", {"device": where, "phase": table}
    )


def check_live_graph(
    model: Model,
    goal: RopeScaling,
    threads: int | None = None,
    backend: str = "cpu",
    sliding_goal: RopeScaling | None = None,
    n_ctx: int | None = None,
) -> Check:
    """Every layer's ROPE nodes, in windows at the start, around the original context and at the end of the extended one.

    Compares their parameters with llama.cpp's rules for this file, their outputs with the reference on their actual inputs, and
    the memory they ran in with the model's device. sliding_goal: that of layers with a sliding window, None if only the file
    has it. n_ctx: the size of the context, if that decides about positions (LongRoPE).
    """
    positions, name = model.positions.at(n_ctx), on_backend("live-graph", backend)
    file, runs = positions.file, positions.runs
    pairing, sections = honoured(file.architecture).pairing, honoured(file.architecture).sections(goal.dim)
    starts = sorted({0, max(0, goal.original_context - LIVE_TOKENS // 2), max(0, goal.extended_context - LIVE_TOKENS)})
    tokens = model.tokenize(sample_text()[:400], add_special=False, parse_special=False)[:LIVE_TOKENS]
    nodes = record_ropes(model, tokens, starts, threads=threads, at_least=n_ctx or 64)
    kinds = layer_kinds(file, model.n_layer)
    slides = positions.effective_sliding(positions.explicit_arguments)
    faults = _missing_layers(nodes, kinds, len(starts)) + _elsewhere(nodes, model)
    full, sliding = (
        [n for n in nodes if 0 <= n.layer < len(kinds) and kinds[n.layer] == kind] for kind in ("full", "sliding")
    )
    judged: list[tuple[list[RopeNode], RopeScaling]] = []
    for some, rules, target in ((full, runs, goal), (sliding, slides, sliding_goal or slides)):
        if some and rules is not None and target is not None:
            faults += _wrong_parameters(
                some, rope_kernel.rope_arguments(rules, pairing, sections), rules.frequency_factors
            )
            judged.append((some, target))
    declared, native = positions.declared, in_keys(goal)
    # Keys that differ from the goal's are reported even if they make the same angles.
    if declared.differences(goal) and native and _has_arguments(native) and runs.frequency_factors is None:
        faults += _wrong_parameters(full, rope_kernel.rope_arguments(native, pairing, sections), None)
    error = angle_error(runs, goal)
    if error.any_difference:
        faults.append(
            f"llama.cpp runs frequencies up to {error.frequency:.2%} off (pair {error.pair}), "
            f"an attention factor {error.attention:.2%} off"
        )
    faults += _described_otherwise(positions, goal)
    if not judged or any(n.arguments.n_dims != g.dim or n.x.shape[-1] < g.dim for some, g in judged for n in some):
        return Check(
            name, "fail", float("inf"), 1.0, "; ".join([*faults, f"nodes do not rotate {goal.dim} dimensions"])
        )
    errors = (rotation_error(n.x, n.y, n.positions, g, pairing) for some, g in judged for n in some)
    worst = max(errors, key=lambda e: e.of_budget)
    value = max(worst.of_budget, float("inf") if faults else 0.0)
    detail = f"{len(nodes)} nodes{_each_place(nodes, model)}, in batches from positions {', '.join(map(str, starts))}; "
    detail += f"closest to its error budget: {worst}"
    if slides is not None and sliding_goal is None:
        detail += "; layers with a sliding window are compared with the file's own keys only"
    return judge(
        name, value, 1.0, "; ".join([*dict.fromkeys(faults), detail]), {"n_nodes": len(nodes), "starts": starts}
    )


def _described_otherwise(positions: FilePositions, goal: RopeScaling) -> list[str]:
    """What of the file's keys and of its own description says other positions than `goal`."""
    file, canonical = positions.file, positions.canonical
    if canonical is None:
        return []
    sides = {CANONICAL_KEYS: canonical}
    if positions.live is None:
        sides = {f"{file.architecture}.rope.scaling.*": positions.declared, **sides}
    faults = [f"{side} says other positions" for side, it in sides.items() if angle_error(it, goal).any_difference]
    return faults if positions.live is None else [*wrong_keys(file, goal), *faults]


def _missing_layers(nodes: list[RopeNode], kinds: list[Kind], n_starts: int) -> list[str]:
    for layer, kind in enumerate(kinds):
        seen, expected = sum(1 for n in nodes if n.layer == layer), 0 if kind == "unrotated" else 2 * n_starts
        if seen != expected:
            return [f"layer {layer} has {seen} ROPE nodes, expected {expected}"]
    return []


def _has_arguments(scaling: RopeScaling) -> bool:
    return scaling.truncate and scaling.ramp == "index" and scaling.frequency_factors is None


def _elsewhere(nodes: list[RopeNode], model: Model) -> list[str]:
    """The memory in which ropes ran that is of none of the model's devices, as a sentence."""
    wanted = tuple(ggml.memory_name(device) for device in model.devices)
    # The CPU's part of a split model may be in main memory that a GPU's driver pinned.
    pinned = ("_Host",) if any(device.kind == "cpu" for device in model.devices) else ()
    strangers = sorted({n.buffer for n in nodes if not n.buffer.startswith(wanted) and not n.buffer.endswith(pinned)})
    return [f"ropes ran in {', '.join(strangers)}, not on {' or '.join(wanted)}"] if strangers else []


def _each_place(nodes: list[RopeNode], model: Model) -> str:
    """Where the ropes of a split model ran: llama.cpp may compute a layer's on a neighbor's device."""
    if not isinstance(model.device, LayerSplit):
        return ""
    places = Counter(node.buffer for node in nodes)
    return f" ({', '.join(f'{n} in {place}' for place, n in sorted(places.items()))})"


def _wrong_parameters(
    nodes: list[RopeNode], expected: rope_kernel.RopeArguments, factors: tuple[float, ...] | None
) -> list[str]:
    """The parameters in which a node differs from llama.cpp's rules, each of them once."""
    faults: dict[str, str] = {}
    ramped = expected.ext_factor != 0
    for node in nodes:
        for name, want in expected.numbers.items():
            if not ramped and name in ("beta_fast", "beta_slow", "n_ctx_orig"):
                continue
            have = getattr(node.arguments, name)
            if abs(have - want) > SAME_RELATIVE * abs(want):
                faults.setdefault(name, f"{node.name} runs {name} {have:.7g}, expected {want:.7g}")
        if node.arguments.sections != expected.sections:
            faults.setdefault(
                "sections", f"{node.name} runs sections {node.arguments.sections}, expected {expected.sections}"
            )
        if (node.factors is None) != (factors is None) or (
            node.factors is not None and not np.array_equal(node.factors, np.asarray(factors, np.float32))
        ):
            faults.setdefault("factors", f"{node.name} has other frequency factors than rope_freqs.weight")
    return list(faults.values())
