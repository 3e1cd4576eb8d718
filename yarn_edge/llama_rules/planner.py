"""How a GGUF of one architecture can carry a scaling. The forms are tried in order, and each is simulated before it is chosen.

native       the keys of `{arch}.rope.*` alone
baked        exact frequencies in a tensor, A in `rope.scaling.attn_factor`: every llama.cpp program runs them
arguments    the keys, plus runtime arguments that yarn-edge passes by itself and other programs do not
live         the nearest keys; yarn-edge gives every ROPE node of the running graph the exact values, other programs do not
approximate  no form is exact, and the caller allowed the nearest one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import EXACT, PlannerOptions
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.angle_error import AngleError, angle_error, worse
from yarn_edge.llama_rules.effective import (
    FROM_MODEL,
    LLAMA_CLASS_DEFAULTS,
    LivePositions,
    RuntimeArguments,
    as_table,
    frequency_divisors,
    simulate,
    spelled_out,
)
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS, Honoured, honoured
from yarn_edge.llama_rules.layers import running, running_sliding
from yarn_edge.llama_rules.rope_keys import in_keys, native_keys, nearest_keys, without_method
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling

Form = Literal["native", "baked", "arguments", "live", "approximate"]
PORTABLE: tuple[Form, ...] = ("native", "baked")  # exact in every llama.cpp program


@dataclass(frozen=True)
class RopePlan:
    """What to write: `keys` (int: uint32, float: float32, bool, str) and, for the baked form, `factors` (D/2,) float32.

    table_names: the tensors that hold `factors`. short: LongRoPE's plan for contexts up to the original one, None for others.
    arguments: what a loader must pass, and do. runs: what will then be computed in layers with full attention; sliding: what
    layers with a sliding window are to run, None if the file decides. error: how far what runs is from what is wanted, in the
    worst layer. elsewhere: the same for other programs, which have only the file.
    """

    form: Form
    keys: dict[str, Any]
    factors: npt.NDArray[np.float32] | None
    arguments: RuntimeArguments
    runs: RopeScaling
    sliding: RopeScaling | None
    error: AngleError
    elsewhere: AngleError
    in_llama_class: bool = True  # also exact in llama_cpp.Llama with its own defaults
    table_names: tuple[str, ...] = ()
    short: RopePlan | None = None

    @property
    def tensors(self) -> dict[str, npt.NDArray[np.float32]]:
        """The tensors to write."""
        tables = {} if self.factors is None else dict.fromkeys(self.table_names, self.factors)
        if self.short is not None and self.short.factors is not None:
            tables[SHORT_FACTORS] = self.short.factors
        return tables

    @property
    def message(self) -> str:
        """What the form means for the user; empty for plain keys."""
        return {
            "native": ""
            if self.in_llama_class
            else "warning: llama_cpp.Llama's own defaults override the betas in the file: pass the arguments that yarn-edge inspect "
            "shows",
            "baked": f"positions are baked into {' and '.join(self.table_names)}: every llama.cpp program runs them"
            + (", and chooses one of the two by the size of the context" if self.short else ""),
            "arguments": "warning: these positions need runtime arguments, which yarn-edge passes by itself (yarn-edge inspect shows "
            f"them); without them, other programs run {self.elsewhere} (--positions portable refuses that)",
            "live": "warning: no file can carry these positions: yarn-edge puts them into the running graph by itself; other "
            f"programs run {self.elsewhere} (--positions portable refuses that)",
            "approximate": f"warning: APPROXIMATE positions: {self.error}; verify will report that",
        }[self.form]


@dataclass(frozen=True)
class _Goal:
    """What a file of one architecture is to run: in layers with full attention, and in those with a sliding window.

    sliding: None if the file has no such layers, or decides about them.
    """

    architecture: str
    full: RopeScaling
    sliding: RopeScaling | None

    @property
    def has_window_keys(self) -> bool:
        return self.sliding is not None and self.sliding != self.full

    def keys(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The keys, with the base and the dimensions of layers with a sliding window where llama.cpp reads them."""
        rule = honoured(self.architecture).sliding
        if self.sliding is None or not self.has_window_keys or rule is None:
            return keys
        own: dict[str, Any] = {}
        if rule.base != "model":
            own[f"{self.architecture}.rope.freq_base_swa"] = float(self.sliding.rope_theta)
        if rule.own_dims:
            own[f"{self.architecture}.rope.dimension_count_swa"] = self.sliding.dim
        return {**keys, **own}

    def file(self, keys: Mapping[str, Any]) -> GGUFFile:
        """A header with these keys, as it will be read."""
        windows = {f"{self.architecture}.attention.sliding_window": 1} if self.sliding is not None else {}
        return _file_to_write(self.full, self.architecture, {**keys, **windows})

    def error(self, file: GGUFFile, arguments: RuntimeArguments, table: tuple[float, ...] | None) -> AngleError:
        """How far what runs is from the goal, in the worst layer."""
        error = angle_error(running(file, arguments, table), self.full)
        sliding = None if self.sliding is None else running_sliding(file, arguments, table)
        return error if self.sliding is None or sliding is None else worse(error, angle_error(sliding, self.sliding))


def plan_rope(
    scaling: RopeScaling, architecture: str, options: PlannerOptions = EXACT, sliding: RopeScaling | None = None
) -> RopePlan:
    """The first form that runs `scaling` exactly on `architecture`. sliding: what layers with a sliding window are to run.

    If no form is exact, `options.allow_approximate` gets the nearest one. Raises YarnEdgeError with the size of the error
    otherwise, and for dynamic scaling, which has no fixed angles.
    """
    row = honoured(architecture)
    if not scaling.is_static:
        raise YarnEdgeError(
            f"{scaling.source('method')}: {scaling.method}: its angles depend on the current length, llama.cpp's do not: "
            "pass --freeze-at N to use the angles of N tokens"
        )
    in_softmax = row.log_multiplier is not None and row.log_multiplier.in_softmax
    if abs(scaling.softmax_factor - 1) > SAME_RELATIVE and not in_softmax:
        raise YarnEdgeError(
            f"{scaling.source('softmax_factor')}: attention logits get an additional factor of {scaling.softmax_factor:.4f}, "
            f"which no key of architecture {architecture} can carry"
        )
    if options.bake == "always" and not row.table_names:
        raise YarnEdgeError(f"--bake-rope always: architecture {architecture} does not load {FREQUENCY_FACTORS}")
    rule = row.sliding
    if sliding is None and rule is not None and (rule.always or row.unrotated):
        sliding = scaling  # one scaling for all layers, of which llama.cpp treats some as windows in every file
    goal = _Goal(architecture, scaling, sliding)
    plans = [plan for form in _forms(row, options) if (plan := form(goal)) is not None]
    exact = [plan for plan in plans if not plan.error.any_difference]
    if exact:
        return next((plan for plan in exact if plan.in_llama_class and plan.form in PORTABLE), exact[0])
    in_file = [plan for plan in plans if plan.form != "live"]
    nearest = min(in_file, key=lambda plan: plan.error.frequency + plan.error.attention, default=None)
    if options.allow_approximate and nearest is not None:
        return replace(nearest, form="approximate")
    raise _refusal(goal, nearest, options)


def _forms(row: Honoured, options: PlannerOptions) -> tuple[Callable[[_Goal], RopePlan | None], ...]:
    """The forms to try, in order."""
    if options.bake == "always":
        return (_baked,)
    baked = (_baked,) if row.table_names and options.bake == "auto" else ()
    return (_native, *baked, *(() if options.positions == "portable" else (_with_arguments, _live)))


def plan_tables(
    short: RopeScaling, long: RopeScaling, architecture: str, options: PlannerOptions = EXACT
) -> RopePlan | None:
    """LongRoPE as it is: both tables in the file, `long` for contexts beyond that of `short`; llama.cpp chooses as it runs.

    None if the architecture does not load them, or if `options` has no tables.
    """
    if honoured(architecture).table_names != (LONG_FACTORS, SHORT_FACTORS) or options.bake == "never":
        return None
    origin = {f"{architecture}.rope.scaling.original_context_length": short.original_context}
    plans = [_baked(_Goal(architecture, scaling, None)) for scaling in (short, long)]
    return replace(plans[1], keys={**plans[1].keys, **origin}, short=plans[0])


def plan_parts(parts: Mapping[str, RopeScaling], architecture: str, options: PlannerOptions = EXACT) -> RopePlan:
    """`plan_rope` for a model whose layers with a sliding window may have their own positions. parts: by layer type.

    Raises YarnEdgeError if no file can give every layer what it needs.
    """
    if len(parts) == 1:
        return plan_rope(next(iter(parts.values())), architecture, options)
    full, sliding = parts.get("full_attention"), parts.get("sliding_attention")
    if full is None or sliding is None or len(parts) > 2:
        raise YarnEdgeError(f"positions differ by {', '.join(parts)}: no GGUF can carry that")
    if honoured(architecture).sliding is None:
        raise YarnEdgeError(
            f"{sliding.source('rope_theta')}: architecture {architecture} gives layers with a sliding window the same positions, and "
            "has no keys for their own positions"
        )
    return plan_rope(full, architecture, options, sliding)


def plain_llama_cpp(scaling: RopeScaling, architecture: str) -> RopeScaling | None:
    """What llama.cpp runs with the keys alone, as other converters write them; None if no keys exist for the method."""
    plan = _native(_Goal(architecture, scaling, None)) if scaling.is_static else None
    return None if plan is None else plan.runs


def _native(goal: _Goal) -> RopePlan | None:
    native = in_keys(goal.full)
    if native is None or native.frequency_factors is not None:
        return None
    return _simulated("native", goal, native_keys(native, goal.architecture), None, FROM_MODEL)


def _baked(goal: _Goal) -> RopePlan:
    scaling = goal.full
    keys = native_keys(without_method(scaling), goal.architecture)
    if scaling.factor > 1:  # not for the angles: it is where mistral3's attention temperature begins
        keys[f"{goal.architecture}.rope.scaling.original_context_length"] = scaling.original_context
    return _simulated("baked", goal, keys, frequency_divisors(scaling), FROM_MODEL)


def _with_arguments(goal: _Goal) -> RopePlan | None:
    native = in_keys(goal.full)
    if native is None or native.frequency_factors is not None:
        return None
    keys = native_keys(native, goal.architecture)
    ratio = keys.get(f"{goal.architecture}.rope.scaling.attn_factor", 1.0)
    return _simulated("arguments", goal, keys, None, spelled_out(native, ratio))


def _live(goal: _Goal) -> RopePlan:
    live = LivePositions(as_table(goal.full), None if goal.sliding is None else as_table(goal.sliding))
    keys = nearest_keys(goal.full, goal.architecture)
    plain = simulate(goal.file(goal.keys(keys)), FROM_MODEL, None)
    ratio = keys.get(f"{goal.architecture}.rope.scaling.attn_factor", 1.0)
    return _simulated("live", goal, keys, None, replace(spelled_out(plain, ratio), live=live))


def _simulated(
    form: Form, goal: _Goal, keys: dict[str, Any], factors: npt.NDArray[np.float32] | None, arguments: RuntimeArguments
) -> RopePlan:
    """The plan for these keys, with llama.cpp's rules applied to them."""
    keys = goal.keys(keys)
    file = goal.file(keys)
    table = None if factors is None else tuple(float(f) for f in factors)
    runs, elsewhere = running(file, arguments, table), goal.error(file, FROM_MODEL, table)
    portable = not goal.error(file, LLAMA_CLASS_DEFAULTS, table).any_difference
    error = goal.error(file, arguments, table)
    own = goal.sliding if goal.has_window_keys or form == "live" else None
    names = honoured(goal.architecture).table_names if table else ()
    return RopePlan(form, keys, factors, arguments, runs, own, error, elsewhere, portable, names)


def _file_to_write(scaling: RopeScaling, architecture: str, keys: Mapping[str, Any]) -> GGUFFile:
    shape = {
        f"{architecture}.embedding_length": scaling.dim,
        f"{architecture}.attention.head_count": 1,
        f"{architecture}.context_length": scaling.extended_context,
        "general.architecture": architecture,
    }
    stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in keys.items()}
    return GGUFFile(Path("(the file to write)"), 3, {**stored, **shape}, {}, 32, 0, 0)


def _refusal(goal: _Goal, nearest: RopePlan | None, options: PlannerOptions) -> YarnEdgeError:
    scaling, architecture = goal.full, goal.architecture
    portable = "--positions portable: " if options.positions == "portable" else ""
    if nearest is None:
        return YarnEdgeError(
            f"{portable}{scaling.source('method')}: {scaling.method} has no form that llama.cpp runs for architecture {architecture}"
        )
    if goal.sliding is not None and not angle_error(nearest.runs, scaling).any_difference:
        return YarnEdgeError(
            f"{portable}{goal.sliding.source('rope_theta')}: architecture {architecture} would give layers with a sliding window "
            f"{nearest.error}, and has no keys for their own positions"
        )
    culprits = {
        n: (a, b) for n, (a, b) in scaling.differences(nearest.runs).items() if n not in ("method", "frequency_factors")
    }
    causes = [f"{scaling.source(n)} is {a!r}, llama.cpp would use {b!r}" for n, (a, b) in sorted(culprits.items())]
    return YarnEdgeError(
        f"{portable}{'; '.join(causes) or scaling.source('method')}: architecture {architecture} cannot carry this. The file "
        f"would run with {nearest.error}; --allow-approximate-rope writes it anyway"
    )
