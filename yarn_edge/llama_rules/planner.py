"""How a GGUF of one architecture can carry a scaling. The forms are tried in order, and each is simulated before it is chosen.

native       the keys of `{arch}.rope.*` alone
baked        exact frequencies in `rope_freqs.weight`, A in `rope.scaling.attn_factor`: every llama.cpp program runs them
arguments    the keys, plus runtime arguments that yarn-edge passes by itself and other programs do not
approximate  no form is exact, and the caller allowed the nearest one
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import EXACT, PlannerOptions
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.llama_rules.effective import (
    FROM_MODEL,
    LLAMA_CLASS_DEFAULTS,
    ROPE_SCALING_TYPES,
    AngleError,
    RuntimeArguments,
    angle_error,
    mscale_ratio,
    simulate,
    spelled_out,
)
from yarn_edge.llama_rules.honoured import honoured
from yarn_edge.llama_rules.layers import sliding_scaling
from yarn_edge.positions import rope
from yarn_edge.positions.scaling import SAME_RELATIVE, RopeScaling, yarn_attention_factor

Form = Literal["native", "baked", "arguments", "approximate"]


@dataclass(frozen=True)
class RopePlan:
    """What to write: `keys` (int: uint32, float: float32, bool, str) and, for the baked form, `factors` (D/2,) float32.

    arguments: what a loader must pass. runs: what llama.cpp will then compute. error: how far that is from what is wanted.
    """

    form: Form
    keys: dict[str, Any]
    factors: npt.NDArray[np.float32] | None
    arguments: RuntimeArguments
    runs: RopeScaling
    error: AngleError
    in_llama_class: bool = True  # also exact in llama_cpp.Llama with its own defaults

    @property
    def message(self) -> str:
        """What the form means for the user; empty for plain keys."""
        return {
            "native": ""
            if self.in_llama_class
            else "warning: llama_cpp.Llama's own defaults override the betas in the file: pass the arguments that yarn-edge inspect "
            "shows",
            "baked": "positions are baked into rope_freqs.weight: every llama.cpp program runs them",
            "arguments": "warning: these positions need runtime arguments, which yarn-edge passes by itself; other programs run "
            "other positions (yarn-edge inspect shows the arguments)",
            "approximate": f"warning: APPROXIMATE positions: frequencies up to {self.error.frequency:.2%} off (pair "
            f"{self.error.pair}), attention factor {self.error.attention:.2%} off; verify will report that",
        }[self.form]


def in_keys(scaling: RopeScaling) -> RopeScaling | None:
    """The same angles by a method that llama.cpp has (none, linear or yarn); None if it has none for them."""
    if scaling.method == "ntk":
        base = rope.ntk_theta(scaling.dim, scaling.rope_theta, scaling.factor)
        return replace(scaling, method="none", rope_theta=base, factor=1.0, original_context=scaling.extended_context)
    if scaling.method == "ntk-by-parts":
        scaling = replace(scaling, method="yarn")
    if scaling.method == "yarn" and scaling.ext_factor == 0:
        return replace(scaling, method="linear")
    return scaling if scaling.method in ROPE_SCALING_TYPES else None


def native_keys(scaling: RopeScaling, architecture: str) -> dict[str, Any]:
    """The keys `{arch}.rope.*` for none, linear or yarn, in order, whether or not llama.cpp honors each of them."""
    prefix = f"{architecture}.rope."
    keys: dict[str, Any] = {
        prefix + "dimension_count": scaling.dim,
        prefix + "freq_base": float(scaling.rope_theta),
        prefix + "scaling.type": scaling.method,
    }
    if scaling.method != "none":
        keys[prefix + "scaling.factor"] = float(scaling.factor)
        keys[prefix + "scaling.original_context_length"] = scaling.original_context
        switch = honoured(architecture).finetuned_switch  # false would turn off all rotation
        if scaling.finetuned is not None and (scaling.finetuned or not switch):
            keys[prefix + "scaling.finetuned"] = scaling.finetuned
    if scaling.method == "yarn":
        keys[prefix + "scaling.yarn_ext_factor"] = float(scaling.ext_factor)
        # Not the model's own ratio, so that a future runtime that honors both keys does not apply it twice.
        keys[prefix + "scaling.yarn_attn_factor"] = 1.0
        keys[prefix + "scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        keys[prefix + "scaling.yarn_beta_slow"] = float(scaling.beta_slow)
    own = yarn_attention_factor(scaling.factor) if scaling.method == "yarn" else 1.0
    log = honoured(architecture).log_multiplier
    if log is not None and log.in_softmax and scaling.method == "yarn" and scaling.factor > 1:
        # The softmax scale gets (A m(mscale_all_dim))^2, with m(x) = 0.1 x ln s + 1.
        all_dim = (math.sqrt(scaling.softmax_factor) / scaling.attention_factor - 1) / (0.1 * math.log(scaling.factor))
        keys[prefix + "scaling.yarn_log_multiplier"] = all_dim * log.unit
        if all_dim:
            own = mscale_ratio(log, all_dim, scaling.factor)
    ratio = scaling.attention_factor / own
    if abs(ratio - 1) > SAME_RELATIVE:
        keys[prefix + "scaling.attn_factor"] = ratio
    return keys


def baked_frequency_factors(scaling: RopeScaling) -> npt.NDArray[np.float32]:
    """theta_d / theta'_d, shape (D/2,): what `rope_freqs.weight` holds in the baked form."""
    plain = rope.rope_inv_freq(scaling.dim, scaling.rope_theta)
    return np.asarray(plain / rope.inv_freq(scaling), dtype=np.float32)


def plan_rope(scaling: RopeScaling, architecture: str, options: PlannerOptions = EXACT) -> RopePlan:
    """The first form that runs `scaling` exactly on `architecture`.

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
    if options.bake == "always" and not row.frequency_factors:
        raise YarnEdgeError(f"--bake-rope always: architecture {architecture} does not load rope_freqs.weight")
    forms = {
        "always": (_baked,),
        "never": (_native, _with_arguments),
        "auto": (_native, _baked, _with_arguments) if row.frequency_factors else (_native, _with_arguments),
    }[options.bake]
    plans = [plan for form in forms if (plan := form(scaling, architecture)) is not None]
    exact = [plan for plan in plans if not plan.error.any_difference]
    if exact:
        return next((plan for plan in exact if plan.in_llama_class and plan.form != "arguments"), exact[0])
    nearest = min(plans, key=lambda plan: plan.error.frequency + plan.error.attention, default=None)
    if options.allow_approximate and nearest is not None:
        return replace(nearest, form="approximate")
    raise _refusal(scaling, architecture, nearest)


def plan_parts(parts: Mapping[str, RopeScaling], architecture: str, options: PlannerOptions = EXACT) -> RopePlan:
    """`plan_rope` for a model whose layers with a sliding window have their own positions. parts: by layer type.

    The plan is that of full attention. Raises YarnEdgeError if llama.cpp would not give the other layers what they need.
    """
    if len(parts) == 1:
        return plan_rope(next(iter(parts.values())), architecture, options)
    full, sliding = parts.get("full_attention"), parts.get("sliding_attention")
    if full is None or sliding is None or len(parts) > 2:
        raise YarnEdgeError(f"positions differ by {', '.join(parts)}: no GGUF can carry that")
    plan = plan_rope(full, architecture, options)
    keys = dict(plan.keys)
    rule = honoured(architecture).sliding
    if rule is not None and rule.base != "model":
        keys[f"{architecture}.rope.freq_base_swa"] = float(sliding.rope_theta)
    file = _file_to_write(plan.runs, architecture, keys | {f"{architecture}.attention.sliding_window": 1})
    runs = sliding_scaling(file, plan.runs)
    error = None if runs is None else angle_error(runs, sliding)
    if error is None or error.any_difference:
        outcome = (
            "the same positions"
            if error is None
            else f"frequencies up to {error.frequency:.2%} off (pair {error.pair})"
        )
        raise YarnEdgeError(
            f"{sliding.source('rope_theta')}: architecture {architecture} would give layers with a sliding window {outcome}, and "
            "has no keys for their own positions"
        )
    return replace(plan, keys=keys)


def plain_llama_cpp(scaling: RopeScaling, architecture: str) -> RopeScaling | None:
    """What llama.cpp runs with the keys alone, as other converters write them; None if no keys exist for the method."""
    plan = _native(scaling, architecture) if scaling.is_static else None
    return None if plan is None else plan.runs


def _native(scaling: RopeScaling, architecture: str) -> RopePlan | None:
    native = in_keys(scaling)
    if native is None or native.frequency_factors is not None:
        return None
    return _simulated("native", scaling, architecture, native_keys(native, architecture), None, FROM_MODEL)


def _baked(scaling: RopeScaling, architecture: str) -> RopePlan:
    plain = replace(
        scaling, method="none", factor=1.0, original_context=scaling.extended_context, frequency_factors=None
    )
    keys = native_keys(plain, architecture)
    if scaling.factor > 1:  # not for the angles: it is where mistral3's attention temperature begins
        keys[f"{architecture}.rope.scaling.original_context_length"] = scaling.original_context
    return _simulated("baked", scaling, architecture, keys, baked_frequency_factors(scaling), FROM_MODEL)


def _with_arguments(scaling: RopeScaling, architecture: str) -> RopePlan | None:
    native = in_keys(scaling)
    if native is None or native.frequency_factors is not None:
        return None
    keys = native_keys(native, architecture)
    ratio = keys.get(f"{architecture}.rope.scaling.attn_factor", 1.0)
    return _simulated("arguments", scaling, architecture, keys, None, spelled_out(native, ratio))


def _simulated(
    form: Form,
    scaling: RopeScaling,
    architecture: str,
    keys: dict[str, Any],
    factors: npt.NDArray[np.float32] | None,
    arguments: RuntimeArguments,
) -> RopePlan:
    """The plan for these keys, with llama.cpp's rules applied to them."""
    file = _file_to_write(scaling, architecture, keys)
    table = None if factors is None else tuple(float(f) for f in factors)
    runs = simulate(file, arguments, table)
    portable = not angle_error(simulate(file, LLAMA_CLASS_DEFAULTS, table), scaling).any_difference
    return RopePlan(form, keys, factors, arguments, runs, angle_error(runs, scaling), portable)


def _file_to_write(scaling: RopeScaling, architecture: str, keys: Mapping[str, Any]) -> GGUFFile:
    shape = {
        f"{architecture}.embedding_length": scaling.dim,
        f"{architecture}.attention.head_count": 1,
        f"{architecture}.context_length": scaling.extended_context,
        "general.architecture": architecture,
    }
    stored = {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in keys.items()}
    return GGUFFile(Path("(the file to write)"), 3, {**stored, **shape}, {}, 32, 0, 0)


def _refusal(scaling: RopeScaling, architecture: str, nearest: RopePlan | None) -> YarnEdgeError:
    if nearest is None:
        return YarnEdgeError(
            f"{scaling.source('method')}: {scaling.method} has no form that llama.cpp runs for architecture {architecture}"
        )
    runs, error = nearest.runs, nearest.error
    culprits = {
        n: (a, b) for n, (a, b) in scaling.differences(runs).items() if n not in ("method", "frequency_factors")
    }
    causes = [f"{scaling.source(n)} is {a!r}, llama.cpp would use {b!r}" for n, (a, b) in sorted(culprits.items())]
    return YarnEdgeError(
        f"{'; '.join(causes) or scaling.source('method')}: architecture {architecture} cannot carry this. The file "
        f"would run with frequencies up to {error.frequency:.2%} off (pair {error.pair}) and an attention factor "
        f"{error.attention:.2%} off; --allow-approximate-rope writes it anyway"
    )
