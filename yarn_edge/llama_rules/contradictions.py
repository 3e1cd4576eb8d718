"""Rope keys of a GGUF that contradict each other, or that llama.cpp does not read as they were meant.

`RULES` has a row per kind. `inspect` tells each with its evidence; what is read from a file for `patch` or a sweep asks for the
flag that settles it, because the file alone does not. Files with a description of their own leave nothing open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from yarn_edge.errors import one_line
from yarn_edge.flags import FLAGS
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.header import BOOL, F32, KIND_NAMES, U32
from yarn_edge.gguf.read import ARRAY
from yarn_edge.llama_rules.description import is_described
from yarn_edge.llama_rules.effective import DEFAULT_FREQ_BASE
from yarn_edge.llama_rules.honoured import HONOURED, LONG_FACTORS, SHORT_FACTORS
from yarn_edge.llama_rules.stated import (
    scaling_key,
    stated_context,
    stated_factor,
    stated_number,
    stated_origin,
    stated_type,
)

DOES_NOT_RUN = "scaling that does not run"
_AS_LINEAR = "for linear scaling add --yarn-ext-factor 0 --yarn-attention-factor 1"
_YARN_KEYS = ("yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_log_multiplier")

_AS_IN_LINEAR = {"yarn_ext_factor": 0.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}  # they say "linear"


@dataclass(frozen=True)
class Contradiction:
    """what: what llama.cpp does. flags: for patch, with letters for values; where: what the letters are.

    settled_by: the fields of RopeScaling any of which, given by a flag, decides. Without one, `patch --repair` may correct it.
    """

    what: str
    evidence: str
    flags: str = ""
    where: str = ""
    settled_by: frozenset[str] = frozenset()

    def is_open(self, fields: Mapping[str, Any]) -> bool:
        """Whether a flag must decide, and none of `fields` does."""
        return bool(self.settled_by) and not self.settled_by & fields.keys()

    @property
    def question(self) -> str:
        """The error of a reading that must not guess, without the file's name."""
        where = f" ({self.where})" if self.where else ""
        return f"{self.evidence}: {self.what}: pass {self.flags}{where}, or --from CHECKPOINT"


def _sizes(file: GGUFFile) -> str:
    """The two contexts of the file, for evidence."""
    origin = f", original_context_length = {stated_origin(file):g}" if stated_origin(file) else ""
    return f"context_length = {stated_context(file):.10g}{origin}"


def _stretch(file: GGUFFile) -> str:
    """What the two contexts say about the factor, "" if nothing."""
    context, origin = stated_context(file), stated_origin(file)
    return f"; context_length / original_context_length is {context / origin:g}" if 0 < origin < context else ""


def _senseless_factor(file: GGUFFile) -> bool:
    """Whether the factor is there and no finite number, which is told as it is."""
    names = ("rope.scaling.factor", "rope.scale_linear")
    return any(f"{file.architecture}.{n}" in file.metadata and stated_number(file, n) is None for n in names)


def _yarn_without_factor(file: GGUFFile) -> Iterator[Contradiction]:
    in_ext_factor = (stated_number(file, "rope.scaling.yarn_ext_factor") or 0) > 1
    absent = not stated_factor(file) and not _senseless_factor(file)
    if stated_type(file) == "yarn" and absent and not in_ext_factor:
        yield Contradiction(
            "llama.cpp takes factor 1 then: it runs plain RoPE",
            f"{scaling_key(file, 'type')} = 'yarn' without {scaling_key(file, 'factor')}, {_sizes(file)}",
            "--yarn-factor F",
            f"where F is what the model was trained with{_stretch(file)}",
            frozenset({"factor"}),
        )


def _factor_below_1(file: GGUFFile) -> Iterator[Contradiction]:
    factor = stated_factor(file)
    if factor and factor < 1 and stated_type(file) != "none":
        inverse = f"; {1 / factor:g} if the key holds 1 / factor" if factor > 0 else ""
        yield Contradiction(
            f"llama.cpp multiplies positions by {1 / factor:g}, where scaling divides them",
            f"{scaling_key(file, 'factor')} = {factor:g}",
            "--yarn-factor F",
            f"where F is the new context / the original context{inverse}",
            frozenset({"factor"}),
        )


def _context_beyond(file: GGUFFile) -> Iterator[Contradiction]:
    factor, origin, context = stated_factor(file), stated_origin(file), stated_context(file)
    yarn = stated_type(file) == "yarn"
    if factor < 1 or not (yarn or (stated_type(file) == "linear" and factor > 1)) or not origin:
        return
    reach = round(min(origin * factor, 1e18))
    if context > reach:
        needed = context / (origin if yarn else factor)
        flag = "--yarn-factor F" if yarn else "--yarn-orig-ctx N"
        letter, own = ("F", factor) if yarn else ("N", origin)
        yield Contradiction(
            f"front ends offer {context:.10g} tokens, the scaling reaches {reach}: the positions beyond are turned farther than "
            "any that it was made for",
            f"{file.architecture}.context_length = {context:.10g}, factor {factor:g} * original {origin:g} = {reach}",
            flag,
            f"where {letter} is {own:g} if the scaling is right (the context becomes {reach}), {needed:g} if the context is",
            frozenset({"factor", "original_context"}),
        )


def _origin_beyond(file: GGUFFile) -> Iterator[Contradiction]:
    context, origin = stated_context(file), stated_origin(file)
    if stated_type(file) in ("yarn", "linear") and stated_factor(file) > 1 and 0 < context < origin:
        yield Contradiction(
            "the context before the extension cannot be longer than the context: llama.cpp takes both as they are",
            f"{scaling_key(file, 'original_context_length')} = {origin:g}, {file.architecture}.context_length = {context:g}",
            "--yarn-orig-ctx N",
            f"where N is {origin:g} if the original is right (the context becomes {origin * stated_factor(file):.10g})",
            frozenset({"original_context"}),
        )


def _nothing_scales(file: GGUFFile) -> Iterator[Contradiction]:
    """Keys of a scaling beside type none, or YaRN's beside linear or no type, which llama.cpp takes for linear."""
    kind, factor, origin = stated_type(file), stated_factor(file), stated_origin(file)
    tables = {LONG_FACTORS, SHORT_FACTORS} & file.tensors.keys()
    if kind not in (None, "none", "linear") or tables or _senseless_factor(file):
        return
    harmless = _AS_IN_LINEAR if kind == "linear" else {"yarn_log_multiplier": 0.0}
    values = {n: stated_number(file, f"rope.scaling.{n}") for n in _YARN_KEYS}
    own = [n for n, value in values.items() if value is not None and value != harmless.get(n)]
    if kind == "none" and factor not in (0.0, 1.0):
        own.insert(0, "factor" if stated_number(file, "rope.scaling.factor") else "")
    plain = kind == "none" or factor in (0.0, 1.0)
    if origin and ((origin != stated_number(file, "context_length") and plain) or (kind is None and not plain)):
        own.append("original_context_length")
    if not own:
        return
    told = ", ".join(f"{scaling_key(file, n)} = {stated_number(file, f'rope.scaling.{n}'):g}" for n in own if n)
    told = told or f"{file.architecture}.rope.scale_linear = {factor:g}"
    state = f"no {scaling_key(file, 'type')}" if kind is None else f"{scaling_key(file, 'type')} = {kind!r}"
    runs = "plain RoPE" if plain else f"linear scaling by {factor:g}"
    default = ", its default" if kind is None else ""
    context = stated_context(file)
    guess = f"{factor:g} or whatever" if factor > 1 else "what"
    yield Contradiction(
        f"llama.cpp runs {runs}{default}",
        f"{state}, but {told}; context_length = {context:.10g}",
        "--yarn-factor F",
        f"where F is {guess} the model was trained with{_stretch(file)}; {_AS_LINEAR}; without scaling, F is 1 and "
        f"--yarn-orig-ctx {context:.10g}",
        frozenset({"factor"}),
    )


def foreign_keys(file: GGUFFile) -> dict[str, Any]:
    """Keys `{other}.rope.*` under the prefix of another architecture, which llama.cpp does not read."""
    found = {}
    for key, value in file.metadata.items():
        prefix, middle, _name = key.partition(".rope.")
        if middle and "." not in prefix and prefix not in (file.architecture, "yarn_edge"):
            found[key] = value
    return found


# Keys of rope, and the values at which an absent one is not missed.
_ABSENT: dict[str, tuple[Any, ...]] = {
    "freq_base": (DEFAULT_FREQ_BASE,),
    "scaling.type": ("none", "linear"),
    "scaling.factor": (0.0, 1.0),
    "scale_linear": (0.0, 1.0),
    "scaling.attn_factor": (1.0,),
    "scaling.original_context_length": (0,),
    **{f"scaling.{name}": () for name in _YARN_KEYS},
}

_SCALARS = (int, float, str)


def _other_prefix(file: GGUFFile) -> Iterator[Contradiction]:
    arch, context = file.architecture, stated_context(file)
    base: list[str] = []
    scaling: list[str] = []
    for key, value in foreign_keys(file).items():
        name = key.partition(".rope.")[2]
        own = file.metadata.get(f"{arch}.rope.{name}")
        if not isinstance(value, _SCALARS) or not isinstance(own, (*_SCALARS, type(None))):
            continue
        if name in _ABSENT and (value not in _ABSENT[name] if own is None else value != own):
            told = f"{one_line(key, 80)} = {one_line(repr(value), 40)}"
            (base if name == "freq_base" else scaling).append(told)
    what = f"the architecture is {arch}: llama.cpp does not read that"
    meant = "from there if it was meant for this model"
    if scaling:
        yield Contradiction(
            what,
            f"{', '.join(scaling[:8])}; {_sizes(file)}",
            "--yarn-factor F --yarn-orig-ctx N",
            f"{meant}; without scaling, F is 1 and N {context:.10g}",
            frozenset({"factor"}),
        )
    if base:
        own = file.metadata.get(f"{arch}.rope.freq_base", DEFAULT_FREQ_BASE)
        where = f"{meant}; llama.cpp now runs {one_line(repr(own), 40)}"
        yield Contradiction(what, base[0], "--rope-theta B", where, frozenset({"rope_theta"}))


def _two_factors(file: GGUFFile) -> Iterator[Contradiction]:
    new, old = stated_number(file, "rope.scaling.factor"), stated_number(file, "rope.scale_linear")
    if new is not None and old and new != old:
        yield Contradiction(
            f"llama.cpp takes {new or 1:g} and ignores the old key",
            f"{scaling_key(file, 'factor')} = {new:g}, {file.architecture}.rope.scale_linear = {old:g}",
            "--yarn-factor F",
            f"where F is {new:g} or {old:g}; {_AS_LINEAR}",
            frozenset({"factor"}),
        )


def _senseless_base(file: GGUFFile) -> Iterator[Contradiction]:
    base = stated_number(file, "rope.freq_base")
    if base is not None and base <= 1:
        yield Contradiction(
            "llama.cpp computes with it: no pair has a usable frequency",
            f"{file.architecture}.rope.freq_base = {base:g}",
            "--rope-theta B",
            "where B is the base that the model was trained with",
            frozenset({"rope_theta"}),
        )


# key -> (its GGUF type in llama.cpp, the field of the flag that replaces it)
_TYPES: dict[str, tuple[int, str]] = {
    "rope.freq_base": (F32, "rope_theta"),
    "rope.scaling.factor": (F32, "factor"),
    "rope.scaling.attn_factor": (F32, "attention_factor"),
    "rope.scaling.original_context_length": (U32, "original_context"),
    "rope.scaling.finetuned": (BOOL, ""),
    "rope.dimension_count": (U32, ""),
    "context_length": (U32, ""),
}
_LETTERS = {"rope_theta": "B", "factor": "F", "attention_factor": "A", "original_context": "N"}


def _wrong_types(file: GGUFFile) -> Iterator[Contradiction]:
    """llama_model_loader::get_key is strict, also between widths of the same kind."""
    for name, (kind, field) in _TYPES.items():
        key = f"{file.architecture}.{name}"
        entry = file.entries.get(key)
        if entry is None or entry.kind in (kind, ARRAY):  # some architectures have arrays: one value per layer
            continue
        readable = stated_number(file, name) is not None or not field
        yield Contradiction(
            f"llama.cpp does not load the file: it expects {KIND_NAMES[kind]}",
            f"{key} = {one_line(repr(file.metadata[key]), 60)} is {KIND_NAMES[entry.kind]}",
            "" if readable else f"{FLAGS[field]} {_LETTERS[field]}",
            "",
            frozenset() if readable else frozenset({field}),
        )


RULES: dict[str, Callable[[GGUFFile], Iterator[Contradiction]]] = {
    "wrong value type": _wrong_types,
    "YaRN without a factor": _yarn_without_factor,
    "factor below 1": _factor_below_1,
    "two factors": _two_factors,
    "context beyond the scaling": _context_beyond,
    "original beyond the context": _origin_beyond,
    DOES_NOT_RUN: _nothing_scales,
    "another architecture's keys": _other_prefix,
    "senseless base": _senseless_base,
}
_ALSO_DESCRIBED = frozenset({"wrong value type"})


def contradictions(file: GGUFFile, name: str) -> list[Contradiction]:
    """What the rule `name` finds in a file."""
    if file.architecture not in HONOURED or (is_described(file) and name not in _ALSO_DESCRIBED):
        return []
    return list(RULES[name](file))


def open_questions(file: GGUFFile, fields: Mapping[str, Any]) -> Iterator[str]:
    """What the file leaves open and none of `fields`, given by flags, settles."""
    for name in RULES:
        yield from (found.question for found in contradictions(file, name) if found.is_open(fields))
