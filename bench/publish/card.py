"""The model card: YAML for the Hub's search, how to run the files, and a table with nothing in it that was not measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from yarn_edge import __version__
from yarn_edge.convert.quant_types import known_quants
from yarn_edge.errors import one_line
from yarn_edge.hub.ggufs import names_quant
from yarn_edge.hub.reference import HubReference

from .measured import MeasuredModel

MARK = "<!-- written by yarn-edge publish -->"


@dataclass(frozen=True)
class CardSettings:
    """What a card states besides measurements. command: the command line. against: what was verified against, "" if nothing was."""

    target: HubReference
    base_model: str = ""
    license: str = ""
    command: str = ""
    against: str = ""
    text: str = ""
    base: str = ""


def card(settings: CardSettings, models: Sequence[MeasuredModel]) -> str:
    """README.md of the repository."""
    name = settings.target.repo.partition("/")[2]
    parts = [
        _front_matter(settings),
        MARK,
        f"# {name}",
        _scaling(models[0]),
        _running(settings, models),
        *_tables(settings, models),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(settings: CardSettings) -> str:
    lines = ["---", "library_name: gguf", "pipeline_tag: text-generation"]
    if settings.base_model:
        lines += [f"base_model: {json.dumps(settings.base_model)}", "base_model_relation: quantized"]
    if settings.license:
        lines.append(f"license: {json.dumps(settings.license)}")
    lines += ["tags:", "- gguf", "- yarn", "- long-context", "- yarn-edge", "---"]
    return "\n".join(lines)


def _scaling(model: MeasuredModel) -> str:
    s = model.scaling
    if s.method == "none":
        return f"Context: {s.original_context} tokens, without an extension."
    return (
        f"Context: {s.extended_context} tokens, extended from {s.original_context} by {s.method} with factor {s.factor:g} "
        f"(attention factor {s.attention_factor:.6g})."
    )


def _running(settings: CardSettings, models: Sequence[MeasuredModel]) -> str:
    repo = settings.target.repo
    word = _word(min(models, key=lambda model: model.n_bytes))
    lines = ["## Run", "", f"    yarn-edge chat hf:{repo}:{word}"]
    if all(model.portable for model in models):
        lines += [f"    llama-server -hf {repo}:{word}", f"    ollama run hf.co/{repo}:{word}"]
    else:
        names = ", ".join(model.gguf.path.name for model in models if not model.portable)
        lines += ["", f"These positions need yarn-edge; other programs run others, without a warning: {_cell(names)}."]
    return "\n".join(lines)


def _word(model: MeasuredModel) -> str:
    """What selects this file after the colon: the type in its name, if there is one, else the name."""
    name = model.gguf.path.name
    named = [quant for quant in known_quants() if names_quant(name, quant)]
    return max(named, key=len, default=name)


def _tables(settings: CardSettings, models: Sequence[MeasuredModel]) -> list[str]:
    lengths = sorted({length for model in models for length, _ppl in model.curve})
    columns = ["file", "MB", "proved", *(f"perplexity, {n} tokens" for n in lengths)]
    with_kld = any(model.kld is not None for model in models)
    columns += ["KL (nats)", "top-1"] if with_kld else []
    rows = [columns, ["---"] * 3 + ["---:"] * (len(columns) - 3)]
    for model in models:
        curve = dict(model.curve)
        row = [model.gguf.path.name, f"{model.n_bytes / 1e6:.1f}", model.proved]
        row += [f"{curve[n]:.4f}" if n in curve else "" for n in lengths]
        if with_kld:
            row += ["", ""] if model.kld is None or model.top1 is None else [f"{model.kld:.3g}", f"{model.top1:.2%}"]
        rows.append(row)
    table = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
    against = f", against {_cell(settings.against)}" if settings.against else ""
    how = [f"Measured by yarn-edge {__version__} with", "", f"    {one_line(settings.command, 1000)}", ""]
    how.append(f"Proved: the checks of `yarn-edge verify` that passed{against}.")
    if lengths:
        how.append(f"Perplexity: on {_cell(settings.text)}, by context length, every token scored.")
    if with_kld:
        how.append(
            f"KL divergence and top-1 agreement: mean over the tokens of that text, from {_cell(settings.base)}."
        )
    hashes = "\n".join(f"    {sha}  {_cell(name)}" for model in models for name, sha in model.sha256.items())
    return ["## Measured", table, "\n".join(how), "## SHA-256", hashes]


def _cell(text: str) -> str:
    """Text in a table: one line that cannot end its cell or begin a tag."""
    return one_line(text, 300).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
