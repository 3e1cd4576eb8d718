"""docs/architectures.md is the table of yarn_edge/llama_rules/honoured.py; UPDATE_DOCS=1 writes it anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from yarn_edge.llama_rules.honoured import CHECKPOINT_ARCHITECTURES, HONOURED, Honoured

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


def cell(row: Honoured, name: str) -> str:
    value = getattr(row, name)
    return "yes" if value is True else "" if value is False else str(value)


def sliding_cell(row: Honoured) -> str:
    """What sliding-window layers get, in words."""
    slide = row.sliding
    if slide is None:
        return ""
    layers = f"all but {'first' if slide.dense_first else 'last'} of {slide.period}"
    base = {"model": "", "file": "base `freq_base_swa` or `freq_base`", "10000": "base `freq_base_swa` or 10000"}
    scale = {"model": "", "file": "1/factor of the file", "one": "factor 1"}
    facts = [
        base[slide.base],
        scale[slide.scale],
        "" if slide.yarn else "plain RoPE",
        "own dims" if slide.own_dims else "",
    ]
    return f"{layers}: {', '.join(f for f in facts if f) or 'the same'}"


def log_cell(row: Honoured) -> str:
    log = row.log_multiplier
    if log is None:
        return ""
    return f"/ {log.unit}" + (", mscale too" if log.same_mscale else "") + (", softmax" if log.in_softmax else "")


def page() -> str:
    """docs/architectures.md."""
    columns: dict[str, Callable[[Honoured], str]] = {
        "pairs": lambda r: r.pairing,
        "rope_freqs": lambda r: cell(r, "frequency_factors"),
        "LongRoPE": lambda r: {"": "", "longrope": "by type", "always": "always"}[r.long_factors],
        "betas": lambda r: cell(r, "betas") + (f" (beta_fast {r.beta_fast:g})" if r.beta_fast != 32 else ""),
        "ext_factor": lambda r: cell(r, "ext_factor"),
        "yarn_attn_factor": lambda r: cell(r, "yarn_attn_factor"),
        "log_multiplier": log_cell,
        "partial": lambda r: cell(r, "partial_rotation"),
        "sliding window": sliding_cell,
        "not rotated": lambda r: r.unrotated,
        "other": lambda r: ("alpha" if r.ntk_alpha else "") + ("finetuned" if r.finetuned_switch else ""),
    }
    types: dict[str, list[str]] = {}
    for model_type, architecture in CHECKPOINT_ARCHITECTURES.items():
        types.setdefault(architecture, []).append(f"`{model_type}`")
    lines = [INTRODUCTION, f"| architecture | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in HONOURED.items():
        lines.append(f"| {name} | {' | '.join(c(row) for c in columns.values())} |")
    lines += ["", "## Checkpoints", "", "`model_type` of config.json, by the GGUF architecture that it becomes.", ""]
    lines += ["| architecture | model_type |", "|---|---|"]
    lines += [f"| {name} | {', '.join(names)} |" for name, names in types.items()]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# What llama.cpp honours, by architecture

The table `HONOURED` of yarn_edge/llama_rules/honoured.py: what llama-cpp-python 0.3.36 does with a GGUF's `{arch}.rope.*` keys. Each row
is held against the running library by tests/llama_rules/test_honoured.py, which reads the rope nodes of a tiny file's live graph; this
page is written by `UPDATE_DOCS=1 pytest tests/llama_rules/test_architectures_page.py`. An architecture that is not here is not judged.

Read for all: `freq_base`, `scaling.type`, `scaling.factor`, `scaling.original_context_length`, `scaling.attn_factor`,
`dimension_count`. What the caller passes in `llama_context_params` wins over the file.

- **pairs**: interleaved (GGUF "NORM") or half-split ("NEOX").
- **rope_freqs**: `rope_freqs.weight` divides the frequencies. Where empty, llama.cpp refuses a file with that tensor
  ("wrong number of tensors"), except pangu-embedded, which loads it and goes on without.
- **LongRoPE**: `rope_factors_long.weight` where the context is larger than the original one, else `rope_factors_short.weight`;
  "by type": only with `scaling.type` longrope, and then `rope_freqs.weight` is not loaded.
- **betas**, **ext_factor**, **yarn_attn_factor**: `scaling.yarn_*` of the file is read. Elsewhere the file's value is ignored.
- **log_multiplier**: `scaling.yarn_log_multiplier` is read; divided by this unit it is mscale_all_dim. The attention factor is
  then m(mscale) / m(mscale_all_dim) with m(x) = 0.1 x ln(factor) + 1 and mscale 1, or mscale_all_dim ("mscale too").
  "softmax": the softmax scale is multiplied by (attention factor * m(mscale_all_dim))².
- **partial**: `dimension_count` may be less than the head. Elsewhere such a file is refused or ends the process.
- **sliding window**: which layers have one where the file gives `attention.sliding_window` and no pattern, and what they are
  rotated by where that is not what full attention gets. Empty: the key is ignored. Plain RoPE has ext_factor 0, factor 1 and
  attention factor 1; otherwise these layers get `scaling.attn_factor` too.
- **not rotated**: layers that know no positions.
- **other**: alpha: `scaling.alpha` changes the base; finetuned: `scaling.finetuned` = false turns every rotation off.
"""


def test_the_page_is_the_table() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "UPDATE_DOCS=1 pytest tests/llama_rules/test_architectures_page.py"
    )
