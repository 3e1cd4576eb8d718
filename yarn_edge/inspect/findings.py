"""The doctor of `inspect`: what is wrong with a GGUF's positions, each finding with its evidence and a remedy.

`DOCTORS` has a row per illness: its name, and the function that looks at a file and its readings and yields what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from yarn_edge.errors import one_line
from yarn_edge.inspect.patient import PATCH, Patient
from yarn_edge.llama_rules.angle_error import angle_error
from yarn_edge.llama_rules.contradictions import RULES, contradictions
from yarn_edge.llama_rules.description import FORM
from yarn_edge.llama_rules.honoured import FREQUENCY_FACTORS, HONOURED
from yarn_edge.positions.scaling import SAME_RELATIVE, yarn_attention_factor


@dataclass(frozen=True)
class Finding:
    """One illness: its name, what is wrong, the evidence in the file, and what to do."""

    name: str
    what: str
    evidence: str
    remedy: str


class Diagnosis(NamedTuple):
    """A `Finding` without its name, which is the doctor's."""

    what: str
    evidence: str
    remedy: str


# key -> (the column of HONOURED that says whether llama.cpp reads it, the value at which it changes nothing)
_SELDOM_READ = {
    "yarn_ext_factor": ("ext_factor", 1.0),
    "yarn_attn_factor": ("yarn_attn_factor", 1.0),
    "yarn_beta_fast": ("betas", 32.0),
    "yarn_beta_slow": ("betas", 1.0),
    "yarn_log_multiplier": ("log_multiplier", 0.0),
}


def _keys_change_nothing(p: Patient) -> bool:
    """Whether the declared keys give the same angles as what runs (a beta of 31 in place of 32, say)."""
    if p.declared is None or p.effective is None or p.unclear_factor is not None:
        return False
    return not angle_error(p.effective, p.declared).any_difference


def _dead_keys(p: Patient) -> Iterator[Diagnosis]:
    row = HONOURED.get(p.file.architecture)
    if row is None or not p.is_yarn or (p.is_ours and p.error is not None):
        return  # where the file's own description does not run, "other positions" has the numbers
    for name, (column, harmless) in _SELDOM_READ.items():
        value = p.number(name)
        spelled_out = name == "yarn_attn_factor" and p.unclear_factor is None
        if name != "yarn_log_multiplier" and _keys_change_nothing(p):
            continue
        if value is None or getattr(row, column, False) or (name == "yarn_ext_factor" and value > 1) or spelled_out:
            continue
        if abs(value - harmless) > SAME_RELATIVE:
            readers = ", ".join(arch for arch, other in HONOURED.items() if getattr(other, column, False))
            scope = f"for {readers} only" if readers else "for no architecture"
            yield Diagnosis(
                f"the file has {p.key(name)}, which llama.cpp does not read",
                f"{p.key(name)} = {value:g}; llama.cpp reads it {scope}",
                p.repair,
            )


def _open_attention_factor(p: Patient) -> Iterator[Diagnosis]:
    """A value of 1 is also what a converter writes for a model whose A is 1 (Laguna)."""
    if p.unclear_factor is not None and abs(p.unclear_factor - 1) <= SAME_RELATIVE and p.effective is not None:
        yield Diagnosis(
            f"converters write a config's attention_factor into a key that llama.cpp does not read: if the config says 1, A "
            f"should be 1, but {p.effective.attention_factor:.4f} runs",
            f"{p.key('yarn_attn_factor')} = 1",
            p.repair,
        )


def _ext_factor_is_the_factor(p: Patient) -> Iterator[Diagnosis]:
    ext = p.number("yarn_ext_factor")
    if p.is_yarn and ext is not None and ext > 1:
        factor = p.number("factor")
        beside = "there is no factor" if not factor else f"the factor is {factor:g}"
        remedy = p.patch()
        if factor and factor != ext:
            remedy = f"{p.patch('--yarn-factor F')}, where F is {factor:g} or {ext:g}, whichever the model was made for"
        yield Diagnosis(
            "ext_factor is a mix between 0 and 1, but here it looks like the factor itself",
            f"{p.key('yarn_ext_factor')} = {ext:g}, {beside}",
            remedy,
        )


def _capped_context(p: Patient) -> Iterator[Diagnosis]:
    context, wanted = p.file.number("context_length"), p.wanted
    origin = p.number("original_context_length")
    if not p.is_ours and (not origin or origin > (context or 0)):
        return  # the file does not say what the context was before the scaling, or contradicts itself
    if wanted is not None and wanted.method != "none" and context is not None and context < wanted.extended_context:
        at_origin = " (the original context)" if context == wanted.original_context else ""
        yield Diagnosis(
            f"front ends stop at {context:g} tokens{at_origin}, the scaling reaches {wanted.extended_context}",
            f"{p.file.architecture}.context_length = {context:g}, factor {wanted.factor:g} * original "
            f"{wanted.original_context}",
            p.patch(),
        )


def _beyond_description(p: Patient) -> Iterator[Diagnosis]:
    context, wanted = p.file.number("context_length"), p.wanted
    if p.is_ours and wanted is not None and context is not None and context > wanted.extended_context:
        yield Diagnosis(
            f"front ends offer {context:.10g} tokens, the file's own description reaches {wanted.extended_context}",
            f"{p.file.architecture}.context_length = {context:.10g}, factor {wanted.factor:g} * original "
            f"{wanted.original_context}",
            p.patch(),
        )


def _missing_origin(p: Patient) -> Iterator[Diagnosis]:
    if p.is_yarn and not p.is_ours and not p.number("original_context_length"):
        context = p.file.metadata.get(f"{p.file.architecture}.context_length")
        yield Diagnosis(
            "llama.cpp takes context_length in its place, which moves the ramp",
            f"no {p.key('original_context_length')}, context_length = {context}",
            f"{p.patch()}, where N is the context before the extension",
        )


# modeling_mistral_yarn.py of the Yarn-Mistral models: _yarn_get_mscale and the defaults of its rotary classes
_MISTRAL_LOG, _MISTRAL_BETAS, _LLAMA_BETAS = 0.07, (128.0, 2.0), (32.0, 1.0)


def _mistral_with_the_llama_formula(p: Patient) -> Iterator[Diagnosis]:
    scaling = p.wanted or p.effective
    names = " ".join(str(p.file.metadata.get(f"general.{k}", "")) for k in ("name", "basename", "base_model.0.name"))
    if p.file.architecture != "llama" or scaling is None or scaling.method != "yarn" or scaling.factor <= 1:
        return
    if "yarn" not in names.lower() or "mistral" not in names.lower():
        return
    a, right = scaling.attention_factor, yarn_attention_factor(scaling.factor, _MISTRAL_LOG)
    flags, wrong = [], []
    if abs(a / yarn_attention_factor(scaling.factor) - 1) <= SAME_RELATIVE:
        wrong.append("0.07 ln s + 1 for A, this file has Llama's 0.1 ln s + 1")
        flags.append(f"--yarn-attention-factor {right:.10g}")
    if (scaling.beta_fast, scaling.beta_slow) == _LLAMA_BETAS:
        wrong.append("betas of 128 and 2, this file has 32 and 1")
        flags.append("--yarn-beta-fast 128 --yarn-beta-slow 2")
    if wrong:
        yield Diagnosis(
            f"the Yarn-Mistral code uses {'; and '.join(wrong)}",
            f"name {one_line(names.strip(), 100)!r}, factor {scaling.factor:g}, A = {a:.4f} (Yarn-Mistral {right:.4f}), "
            f"beta_fast = {scaling.beta_fast:g} (128), beta_slow = {scaling.beta_slow:g} (2)",
            p.patch(*flags),
        )


def _mistral_before_apply_scale(p: Patient) -> Iterator[Diagnosis]:
    factor, temperature = p.number("factor"), f"{p.file.architecture}.attention.temperature_scale"
    if p.file.architecture != "mistral3" or not p.is_yarn or not factor or temperature in p.file.metadata:
        return
    if p.number("yarn_log_multiplier") == 1:
        yield Diagnosis(
            "llama.cpp's converter ignored apply_scale of params.json until May 2026 (ggml-org/llama.cpp pull 22612): if it "
            "is true, A is 1 instead of 0.1 ln s + 1",
            f"{p.key('yarn_log_multiplier')} = 1 and no {temperature}, which the models that really have a multiplier of 1 carry",
            f"if params.json has apply_scale true: "
            f"{p.patch(f'--yarn-attention-factor {yarn_attention_factor(factor):.10g}')}",
        )


# Architectures whose checkpoints have truncate false. No GGUF key can say that, and llama.cpp does not do it.
_WITHOUT_ROUNDING = frozenset({"gpt-oss"})


def _trained_without_rounding(p: Patient) -> Iterator[Diagnosis]:
    if p.file.architecture not in _WITHOUT_ROUNDING or not p.is_yarn or p.is_ours or p.effective is None:
        return
    error = angle_error(p.effective, replace(p.effective, truncate=False))
    if error.any_difference:
        yield Diagnosis(
            "these checkpoints have truncate false, but llama.cpp rounds the ends of the ramp to whole pairs",
            f"frequencies up to {error.frequency:.2%} off (pair {error.pair}) if the checkpoint's config has truncate false",
            f"{PATCH} --from CHECKPOINT; yarn-edge then puts the exact positions into the running graph, which other programs do not",
        )


# Architectures whose checkpoints do not use YaRN, and what they use.
_NEVER_YARN = {
    "phi3": "LongRoPE",
    "gemma": "plain RoPE",
    "gemma2": "plain RoPE",
    "gemma3": "linear scaling on full-attention layers",
    "command-r": "plain RoPE",
    "cohere2": "plain RoPE",
    "stablelm": "plain RoPE",
    "starcoder2": "plain RoPE",
    "falcon": "plain RoPE",
}


def _never_had_yarn(p: Patient) -> Iterator[Diagnosis]:
    if not p.is_yarn:
        return
    remedy = (
        f"check the checkpoint's config; if it has no YaRN: {PATCH} --from CHECKPOINT. "
        "YaRN added to such a model on purpose is static extension without fine-tuning"
    )
    evidence = f"{p.key('type')} = 'yarn', factor {p.raw('factor')}"
    arch = p.file.architecture
    if arch in _NEVER_YARN:
        yield Diagnosis(f"checkpoints of architecture {arch} use {_NEVER_YARN[arch]}, not YaRN", evidence, remedy)
    elif any(factor != 1 for factor in p.own_factors):
        yield Diagnosis(
            "the file scales twice: it has its own frequency factors (Llama 3, or baked), and YaRN on top of them",
            f"{evidence}, and tensor {FREQUENCY_FACTORS}",
            remedy,
        )


def _other_positions(p: Patient) -> Iterator[Diagnosis]:
    """What runs is not what is wanted, in numbers."""
    error = p.error
    if error is None or p.effective is None or p.wanted is None:
        return
    fields = {n: v for n, v in p.wanted.differences(p.effective).items() if n not in ("method", "frequency_factors")}
    pairs = "; ".join(f"{n} {a!r} is wanted, {b!r} runs" for n, (a, b) in sorted(fields.items()))
    where = pairs or ("layers with a sliding window" if p.sliding is not None else "")
    yield Diagnosis(
        "plain llama.cpp runs other positions than the file describes",
        f"frequencies up to {error.frequency:.2%} off (pair {error.pair}), attention factor {error.attention:.2%} off: "
        f"{where}",
        p.repair,
    )


def _description_disagrees(p: Patient) -> Iterator[Diagnosis]:
    form = str(p.file.metadata.get(FORM))  # no keys can say these, or the user asked for the nearest
    if p.declared is None or p.wanted is None or form in ("approximate", "live"):
        return
    if angle_error(p.declared, p.wanted).any_difference:
        fields = p.wanted.differences(p.declared)
        pairs = "; ".join(f"{n}: keys {b!r}, description {a!r}" for n, (a, b) in sorted(fields.items()))
        yield Diagnosis("the rope keys disagree with the file's own description", pairs, p.patch())


def _contradiction(name: str) -> Callable[[Patient], Iterator[Diagnosis]]:
    """The doctor for a row of RULES."""

    def doctor(p: Patient) -> Iterator[Diagnosis]:
        for found in contradictions(p.file, name):
            command = p.patch(found.flags) if found.flags else p.patch()
            yield Diagnosis(found.what, found.evidence, f"{command}, {found.where}" if found.where else command)

    return doctor


DOCTORS: dict[str, Callable[[Patient], Iterator[Diagnosis]]] = {
    **{name: _contradiction(name) for name in RULES},
    "open attention factor": _open_attention_factor,
    "trained without rounding": _trained_without_rounding,
    "factor in ext_factor": _ext_factor_is_the_factor,
    "dead key": _dead_keys,
    "missing original context": _missing_origin,
    "context capped": _capped_context,
    "context beyond the description": _beyond_description,
    "Yarn-Mistral with Llama's parameters": _mistral_with_the_llama_formula,
    "Mistral before apply_scale": _mistral_before_apply_scale,
    "YaRN where there was none": _never_had_yarn,
    "keys were changed": _description_disagrees,
    "other positions": _other_positions,
}


def examine(patient: Patient) -> list[Finding]:
    """All findings, in the order of DOCTORS."""
    return [Finding(name, *diagnosis) for name, doctor in DOCTORS.items() for diagnosis in doctor(patient)]
