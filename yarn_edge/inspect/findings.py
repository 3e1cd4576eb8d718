"""The doctor of `inspect`: what is wrong with a GGUF's positions, each finding with its evidence and a remedy.

One function per illness, all in `DOCTORS`; each looks at the file and at its three readings and yields what it finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from yarn_edge.errors import one_line
from yarn_edge.inspect.patient import PATCH, Finding, Patient
from yarn_edge.llama_rules.description import CANONICAL
from yarn_edge.llama_rules.effective import FREQUENCY_FACTORS, angle_error
from yarn_edge.llama_rules.honoured import HONOURED
from yarn_edge.positions.scaling import SAME_RELATIVE, yarn_attention_factor

# key -> (column of the table that says whether it is read, the value at which it changes nothing)
_SELDOM_READ = {
    "yarn_ext_factor": ("ext_factor", 1.0),
    "yarn_attn_factor": ("yarn_attn_factor", 1.0),
    "yarn_beta_fast": ("betas", 32.0),
    "yarn_beta_slow": ("betas", 1.0),
    "yarn_log_multiplier": ("log_multiplier", 0.0),
}


def _keys_change_nothing(p: Patient) -> bool:
    """Whether what the keys say comes to the same angles as what runs (a beta of 31 for 32, say)."""
    both = p.declared is not None and p.effective is not None
    return both and not angle_error(p.effective, p.declared).any_difference and p.unclear_factor is None  # type: ignore[arg-type]


def _dead_keys(p: Patient) -> Iterator[Finding]:
    row = HONOURED.get(p.file.architecture)
    if row is None or not p.is_yarn or (p.is_ours and _runs_otherwise(p)):
        return  # a description tells it all: then "other positions" has the numbers
    for name, (column, harmless) in _SELDOM_READ.items():
        value = p.number(name)
        spelled_out = name == "yarn_attn_factor" and p.unclear_factor is None
        if name != "yarn_log_multiplier" and _keys_change_nothing(p):
            continue
        if value is None or getattr(row, column, False) or (name == "yarn_ext_factor" and value > 1) or spelled_out:
            continue
        if abs(value - harmless) > SAME_RELATIVE:
            readers = [arch for arch, other in HONOURED.items() if getattr(other, column, False)]
            told = (
                f"llama.cpp reads it for {', '.join(readers)} only"
                if readers
                else "llama.cpp reads it for no architecture"
            )
            yield Finding(
                "dead key", f"{p.key(name)} is written and not honoured", f"{p.key(name)} = {value:g}; {told}", p.repair
            )


def _open_attention_factor(p: Patient) -> Iterator[Finding]:
    """1 is what a converter writes for a model whose A is 1 (Laguna), too."""
    if p.unclear_factor is not None and abs(p.unclear_factor - 1) <= SAME_RELATIVE and p.effective is not None:
        yield Finding(
            "open attention factor",
            f"converters write a config's attention_factor into a key that llama.cpp does not read: if it is 1 there, A should "
            f"be 1, and {p.effective.attention_factor:.4f} runs",
            f"{p.key('yarn_attn_factor')} = 1",
            p.repair,
        )


def _ext_factor_is_the_factor(p: Patient) -> Iterator[Finding]:
    ext = p.number("yarn_ext_factor")
    if p.is_yarn and ext is not None and ext > 1:
        factor = p.number("factor")
        told = "there is no factor" if not factor else f"the factor is {factor:g}"
        remedy = p.patch()
        if factor and factor != ext:
            remedy = f"{p.patch('--yarn-factor F')}, where F is {factor:g} or {ext:g}, whichever the model was made for"
        yield Finding(
            "factor in ext_factor",
            "ext_factor is a mix between 0 and 1, here it looks like the factor itself",
            f"{p.key('yarn_ext_factor')} = {ext:g}, {told}",
            remedy,
        )


def _capped_context(p: Patient) -> Iterator[Finding]:
    context, said = p.file.number("context_length"), p.wanted
    if not p.is_ours and not p.number("original_context_length"):
        return  # what it was before the scaling is not told
    if said is not None and said.method != "none" and context is not None and context < said.extended_context:
        at_origin = " (the original context)" if context == said.original_context else ""
        yield Finding(
            "context capped",
            f"front ends stop at {context:g} tokens{at_origin}, the scaling reaches {said.extended_context}",
            f"{p.file.architecture}.context_length = {context:g}, factor {said.factor:g} * original "
            f"{said.original_context}",
            p.patch(),
        )


def _missing_origin(p: Patient) -> Iterator[Finding]:
    if p.is_yarn and not p.is_ours and p.raw("original_context_length") is None:
        yield Finding(
            "missing original context",
            "llama.cpp takes context_length in its place, and the ramp moves with it",
            f"no {p.key('original_context_length')}, context_length = {p.file.metadata.get(p.file.architecture + '.context_length')}",
            f"{p.patch()}, where N is the context before the extension",
        )


# modeling_mistral_yarn.py of the Yarn-Mistral models: _yarn_get_mscale and the defaults of its rotary classes
_MISTRAL_LOG, _MISTRAL_BETAS, _LLAMA_BETAS = 0.07, (128.0, 2.0), (32.0, 1.0)


def _mistral_with_the_llama_formula(p: Patient) -> Iterator[Finding]:
    said = p.wanted or p.effective
    names = " ".join(str(p.file.metadata.get(f"general.{k}", "")) for k in ("name", "basename", "base_model.0.name"))
    if p.file.architecture != "llama" or said is None or said.method != "yarn" or said.factor <= 1:
        return
    if "yarn" not in names.lower() or "mistral" not in names.lower():
        return
    a, right = said.attention_factor, yarn_attention_factor(said.factor, _MISTRAL_LOG)
    flags, wrong = [], []
    if abs(a / yarn_attention_factor(said.factor) - 1) <= SAME_RELATIVE:
        wrong.append("0.07 ln s + 1 for A, this file has Llama's 0.1 ln s + 1")
        flags.append(f"--yarn-attention-factor {right:.10g}")
    if (said.beta_fast, said.beta_slow) == _LLAMA_BETAS:
        wrong.append("betas of 128 and 2, this file has 32 and 1")
        flags.append("--yarn-beta-fast 128 --yarn-beta-slow 2")
    if wrong:
        yield Finding(
            "Yarn-Mistral with Llama's parameters",
            f"the Yarn-Mistral code uses {'; and '.join(wrong)}",
            f"name {one_line(names.strip(), 100)!r}, factor {said.factor:g}, A = {a:.4f} (Yarn-Mistral {right:.4f}), "
            f"beta_fast = {said.beta_fast:g} (128), beta_slow = {said.beta_slow:g} (2)",
            p.patch(*flags),
        )


def _mistral_before_apply_scale(p: Patient) -> Iterator[Finding]:
    factor, temperature = p.number("factor"), f"{p.file.architecture}.attention.temperature_scale"
    if p.file.architecture != "mistral3" or not p.is_yarn or not factor or temperature in p.file.metadata:
        return
    if p.number("yarn_log_multiplier") == 1:
        yield Finding(
            "Mistral before apply_scale",
            "llama.cpp's converter ignored apply_scale of params.json until May 2026 (ggml-org/llama.cpp pull 22612): where "
            "it is true, A is 1 instead of 0.1 ln s + 1",
            f"{p.key('yarn_log_multiplier')} = 1 and no {temperature}, which the models that really have it carry",
            f"if params.json says apply_scale true: "
            f"{p.patch(f'--yarn-attention-factor {yarn_attention_factor(factor):.10g}')}",
        )


# Architectures whose checkpoints have truncate false, which no key of a GGUF says and llama.cpp does not do.
_WITHOUT_ROUNDING = frozenset({"gpt-oss"})


def _trained_without_rounding(p: Patient) -> Iterator[Finding]:
    if p.file.architecture not in _WITHOUT_ROUNDING or not p.is_yarn or p.is_ours or p.effective is None:
        return
    error = angle_error(p.effective, replace(p.effective, truncate=False))
    if error.any_difference:
        yield Finding(
            "trained without rounding",
            "these checkpoints have truncate false, llama.cpp rounds the ends of the ramp to whole pairs",
            f"frequencies up to {error.frequency:.2%} off (pair {error.pair}) if the checkpoint's config says truncate false",
            "no GGUF of this architecture can carry it: know of it, or run the checkpoint elsewhere",
        )


# Architectures whose checkpoints extend their context in another way than YaRN, with that way.
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
    "glm4": "plain RoPE",
}


def _never_had_yarn(p: Patient) -> Iterator[Finding]:
    if not p.is_yarn:
        return
    remedy = (
        f"check the checkpoint's config; if it has no YaRN: {PATCH} --from CHECKPOINT. "
        "YaRN by choice on such a model is static extension without fine-tuning"
    )
    evidence = f"{p.key('type')} = 'yarn', factor {p.raw('factor')}"
    arch = p.file.architecture
    if arch in _NEVER_YARN:
        what = f"checkpoints of architecture {arch} use {_NEVER_YARN[arch]}, not YaRN"
        yield Finding("YaRN where there was none", what, evidence, remedy)
    elif any(factor != 1 for factor in _own_factors(p)):
        yield Finding(
            "YaRN where there was none",
            "the file scales twice: frequency factors of its own (Llama 3, or baked) and YaRN on top of them",
            f"{evidence}, and tensor {FREQUENCY_FACTORS}",
            remedy,
        )


def _own_factors(p: Patient) -> tuple[float, ...]:
    """What the file's own tensor divides the frequencies by; all ones after a patch that made a baked file plain again."""
    if FREQUENCY_FACTORS not in p.file.tensors:
        return ()
    known = p.effective or p.declared
    return (0.0,) if known is None or known.frequency_factors is None else known.frequency_factors


def _runs_otherwise(p: Patient) -> bool:
    return p.effective is not None and p.wanted is not None and angle_error(p.effective, p.wanted).any_difference


def _other_positions(p: Patient) -> Iterator[Finding]:
    """What runs is not what is wanted, in numbers."""
    if p.effective is None or p.wanted is None or not _runs_otherwise(p):
        return
    error = angle_error(p.effective, p.wanted)
    evidence = (
        f"frequencies up to {error.frequency:.2%} off (pair {error.pair}), attention factor {error.attention:.2%} off"
    )
    differing = {n: v for n, v in p.wanted.differences(p.effective).items() if n not in ("method", "frequency_factors")}
    told = "; ".join(f"{n} {a!r} is wanted, {b!r} runs" for n, (a, b) in sorted(differing.items()))
    yield Finding(
        "other positions",
        "plain llama.cpp runs other positions than the file describes",
        f"{evidence}: {told}",
        p.repair,
    )


def _description_disagrees(p: Patient) -> Iterator[Finding]:
    approximate = str(p.file.metadata.get(CANONICAL + "form")) == "approximate"  # as it was asked for
    if p.declared is None or p.wanted is None or approximate:
        return
    error = angle_error(p.declared, p.wanted)
    if error.any_difference:
        differing = p.wanted.differences(p.declared)
        told = "; ".join(f"{n}: keys {b!r}, description {a!r}" for n, (a, b) in sorted(differing.items()))
        yield Finding("keys were changed", "the rope keys are not those of the file's own description", told, p.patch())


DOCTORS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    _open_attention_factor,
    _trained_without_rounding,
    _ext_factor_is_the_factor,
    _dead_keys,
    _missing_origin,
    _capped_context,
    _mistral_with_the_llama_formula,
    _mistral_before_apply_scale,
    _never_had_yarn,
    _description_disagrees,
    _other_positions,
)


def examine(patient: Patient) -> list[Finding]:
    """All findings, in the order of DOCTORS."""
    return [finding for doctor in DOCTORS for finding in doctor(patient)]
