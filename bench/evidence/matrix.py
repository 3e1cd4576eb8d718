"""Dialects times architectures: each is written as a checkpoint of real weights, converted to F32, and compared with the truth.

`python -m yarn_edge.bench.evidence.matrix` prints the table of docs/dialects.md; a test checks its limits. A case is a row: the
family, its config, the options of `convert`, the source of the truth, and whether the case must be refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import EXACT, NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.stdout import write_text
from yarn_edge.verify.transformers_reference import Divergence, divergence

from ..standalone import run_module
from .dialect_oracles import Formula, Truth, dynamic_ntk, nous
from .smollm2 import CONTEXT, N_LAYER, ROPE_THETA, write_checkpoint

N_TOKENS = 384
KL_LIMIT = 1e-7
LONG = 4 * CONTEXT
_ORIGIN = {"original_max_position_embeddings": CONTEXT}


def _v4(kind: str = "yarn", **block: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, "factor": 4.0, **_ORIGIN, **block}, "max_position_embeddings": LONG}


def _v5(**block: Any) -> dict[str, Any]:
    values = {"rope_type": "yarn", "rope_theta": ROPE_THETA, "factor": 4.0, **_ORIGIN, **block}
    return {"rope_parameters": values, "rope_theta": ..., "max_position_embeddings": LONG}


def _reaching(original: int, factor: float, **block: Any) -> dict[str, Any]:
    config = _v5(factor=factor, original_max_position_embeddings=original, **block)
    return config | {"max_position_embeddings": int(original * factor)}


def _nous(kind: str = "yarn", **block: Any) -> dict[str, Any]:
    values = {"type": kind, "factor": 4.0, **_ORIGIN, "finetuned": True, **block}
    return {"rope_scaling": values, "max_position_embeddings": LONG}


def _by_layer(**block: Any) -> dict[str, Any]:
    """YaRN in layers with full attention, plain RoPE in those with a sliding window."""
    config = _v5(**block)
    plain = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return config | {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": plain}}


LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "max_position_embeddings": 8192,
}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}
NOUS_DYNAMIC = _nous("dynamic-yarn", finetuned=False) | {"max_position_embeddings": CONTEXT}
MISTRAL_CODE = ("modeling_mistral_yarn.py",)
LLAMA_CODE = ("modeling_llama_yarn.py",)


@dataclass(frozen=True)
class MatrixCase:
    """One combination. formula: None if transformers itself is the truth. refused: part of the expected error message."""

    dialect: str
    family: str
    config: dict[str, Any]
    form: str = "native"
    formula: Formula | None = None
    siblings: tuple[str, ...] = ()
    overrides: ScalingOverrides = NO_OVERRIDES
    planner: PlannerOptions = EXACT
    refused: str = ""

    def __str__(self) -> str:
        return f"{self.dialect}, {self.family}"


OWN: dict[str, Any] = {"beta_fast": 8.0, "beta_slow": 2.0}
CASES: tuple[MatrixCase, ...] = (
    MatrixCase("transformers v4", "llama", _v4()),
    MatrixCase("transformers v4", "mistral", _v4()),
    MatrixCase("transformers v4 (Qwen2.5)", "qwen2", _v4()),
    MatrixCase("transformers v4 (Qwen3)", "qwen3", _v4() | {"max_position_embeddings": 10240}),
    MatrixCase("transformers v5", "llama", _v5()),
    MatrixCase("transformers v5", "qwen2", _v5()),
    MatrixCase("attention_factor 1.35", "llama", _v4(attention_factor=1.35)),
    MatrixCase("attention_factor 1.35", "qwen2", _v4(attention_factor=1.35)),
    MatrixCase("attention_factor 1.35", "qwen3", _v5(attention_factor=1.35)),
    MatrixCase("attention_factor 1 (Laguna)", "mistral", _v4(attention_factor=1.0)),
    MatrixCase("attention_factor spelled out (OLMo 3)", "llama", _v4(attention_factor=1.138629436111989)),
    MatrixCase("own A and betas (yarn.md, section 3)", "llama", _v4(attention_factor=1.35, **OWN), "baked"),
    MatrixCase("own A and betas", "llama", _v4(attention_factor=1.35, **OWN), "arguments", planner=PlannerOptions("never")),
    MatrixCase("own A and betas", "mistral", _v4(attention_factor=1.35, **OWN), "baked"),
    MatrixCase("own A and betas", "qwen2", _v4(attention_factor=1.35, **OWN), "arguments"),
    MatrixCase("own A and betas", "qwen3", _v4(attention_factor=1.35, **OWN), "arguments"),
    MatrixCase("defaults, baked by choice", "llama", _v4(), "baked", planner=PlannerOptions("always")),
    MatrixCase("truncate false (gpt-oss)", "llama", _v4(truncate=False), "baked"),
    MatrixCase("truncate false (gpt-oss), not baked", "llama", _v4(truncate=False), "live", planner=PlannerOptions("never")),
    MatrixCase("truncate false (gpt-oss)", "qwen2", _v4(truncate=False), "live"),
    MatrixCase("truncate false (gpt-oss)", "qwen3", _v4(truncate=False), "live"),
    MatrixCase("truncate false, portable", "qwen3", _v4(truncate=False), planner=PlannerOptions(positions="portable"),
         refused="truncate is False, llama.cpp would use True"),
    MatrixCase("mscale, mscale_all_dim", "llama", _v4(mscale=1.0, mscale_all_dim=0.5)),
    MatrixCase("mscale, mscale_all_dim (Ministral 3)", "qwen3", _v5(mscale=1.0, mscale_all_dim=1.0)),
    MatrixCase("factor null", "llama", _v4(factor=None)),
    MatrixCase("Nous Llama", "llama", _nous(), formula=nous(0.1)),
    MatrixCase("Nous Llama, attn_factor 1.2", "llama", _nous(attn_factor=1.2), formula=nous(0.1)),
    MatrixCase("Nous Llama, extrapolation_factor 0.5", "llama", _nous(extrapolation_factor=0.5), "baked", nous(0.1), LLAMA_CODE),
    MatrixCase("Nous Llama, dynamic-yarn at 24576", "llama", NOUS_DYNAMIC, formula=nous(0.1, length=24576), siblings=LLAMA_CODE,
         overrides=ScalingOverrides(freeze_at=24576)),
    MatrixCase("Nous Mistral (0.07, betas 128 and 2)", "mistral", _nous(), "baked", nous(0.07, (128, 2)), MISTRAL_CODE),
    MatrixCase("Nous Mistral (0.07), own betas", "mistral", _nous(**OWN), "baked", nous(0.07, (128, 2)), MISTRAL_CODE),
    MatrixCase("linear", "llama", _v4("linear")),
    MatrixCase("linear", "qwen3", _v4("linear")),
    MatrixCase("dynamic NTK at 16384", "llama", DYNAMIC, formula=dynamic_ntk(16384), overrides=ScalingOverrides(freeze_at=16384)),
    MatrixCase("dynamic NTK at 16384", "qwen2", DYNAMIC, formula=dynamic_ntk(16384), overrides=ScalingOverrides(freeze_at=16384)),
    MatrixCase("dynamic NTK", "llama", DYNAMIC, refused="--freeze-at"),
    MatrixCase("Llama 3", "llama", LLAMA3, "baked"),
    MatrixCase("Llama 3", "qwen2", LLAMA3, "live"),
    # The YaRN of their model cards; experts are the dense model, cut.
    MatrixCase("transformers v5 (Qwen3-30B-A3B)", "qwen3_moe", _reaching(32768, 4.0)),
    MatrixCase("transformers v5 (SmolLM3)", "smollm3", _reaching(65536, 2.0)),
    MatrixCase("transformers v5 (Ministral 3)", "ministral3", _reaching(16384, 16.0, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
         mscale_all_dim=1.0, llama_4_scaling_beta=0.1)),
    MatrixCase("by layer type (Mellum 2)", "mellum", _by_layer(factor=16.0, attention_factor=1.2772588722239782)
         | {"max_position_embeddings": 16 * CONTEXT}),
    MatrixCase("LongRoPE", "llama", {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
         **_ORIGIN, "max_position_embeddings": LONG}, refused="context"),
    MatrixCase("Nous Mistral without its code", "mistral", _nous(), refused="0.07"),
    MatrixCase("attn_factor 0.878 (DeepSeek-R1-0528-Qwen3-8B)", "qwen3", _v4(attn_factor=0.8782488562869419)),
    MatrixCase("attn_factor 1.2 in transformers' dialect, multiplied", "llama", _v4(attn_factor=1.2), formula=nous(0.1),
         overrides=ScalingOverrides(attention_factor_reading="multiply")),
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The result of a case: the divergence and the form, or the refusal."""

    case: MatrixCase
    divergence: Divergence | None
    form: str
    refusal: str


class Workshop:
    """Real weights in every family, each written and loaded in transformers once.

    n_tokens: tokens to compare. n_layers: how many of the model's first layers are used.
    """

    def __init__(self, folder: Path, n_tokens: int = N_TOKENS, n_layers: int = N_LAYER) -> None:
        self.folder, self.n_tokens, self.n_layers = folder, n_tokens, n_layers
        self.truths: dict[str, Truth] = {}

    def base(self, family: str) -> Path:
        """The plain checkpoint of a family."""
        path = self.folder / f"base-{family}"
        return path if path.exists() else write_checkpoint(path, family=family, dtype="F32", n_layers=self.n_layers)

    def truth(self, family: str) -> Truth:
        """Its weights in transformers; only one family is kept in memory."""
        if family not in self.truths:
            self.truths = {family: Truth.load(self.base(family))}
        return self.truths[family]

    def checkpoint(self, case: MatrixCase) -> Path:
        """The family's weights under the case's config."""
        base, folder = self.base(case.family), self.folder / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for item in base.iterdir():
            (folder / item.name).symlink_to(item)
        (folder / "config.json").unlink()
        values = json.loads((base / "config.json").read_text(encoding="utf-8")) | case.config
        values = {k: v for k, v in values.items() if v is not ...}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        for name in case.siblings:
            (folder / name).write_text("# the authors' code\n", encoding="utf-8")
        return folder

    def run(self, case: MatrixCase) -> Result:
        """Convert and compare. A refusal is a result, too."""
        folder = self.checkpoint(case)
        try:
            output = str(self.folder / "case.gguf")
            path = convert(folder, output, "F32", force=True, overrides=case.overrides, planner=case.planner)[0]
        except YarnEdgeError as refusal:
            return Result(case, None, "refused", str(refusal))
        truth = self.truth(case.family)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if case.formula is None:
            truth.as_transformers_reads(folder)
        else:
            truth.by_formula(*case.formula(config))
        with Model(path) as model:
            tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[: self.n_tokens]
            n = self.n_tokens
            settings = ContextSettings(n_ctx=n, n_batch=n, kv_type="f32", attention="plain")
            with open_context(model, settings) as context:
                context.evaluate(tokens, 0, "all")
                apart = divergence(truth.logits(tokens), context.logits())
            form = str(model.gguf.metadata["yarn_edge.rope.form"])
        return Result(case, apart, form, "")


@contextmanager
def workshop(n_tokens: int = N_TOKENS, n_layers: int = N_LAYER) -> Iterator[Workshop]:
    """A workshop in a temporary folder (about 3 GB with all layers)."""
    with tempfile.TemporaryDirectory(prefix="yarn-edge-matrix-") as folder:
        yield Workshop(Path(folder), n_tokens, n_layers)


def run(_args: argparse.Namespace) -> int:
    """Print the table as Markdown. Returns 1 if the result of a case is not what its row says."""
    out, good = write_text, True
    out("| dialect | checkpoint | carried as | truth | mean KL (nats) | top-1 |\n|---|---|---|---|---|---|\n")
    with workshop() as shop:
        for case in sorted(CASES, key=lambda c: c.family):
            result = shop.run(case)
            if result.divergence is None:
                good &= bool(case.refused) and case.refused in result.refusal
                out(f"| {case.dialect} | {case.family} | **refused** | | | |\n")
                continue
            good &= result.form == case.form and result.divergence.kl_mean <= KL_LIMIT
            truth = "transformers" if case.formula is None else "authors' formulas"
            numbers = f"{result.divergence.kl_mean:.1e} | {result.divergence.top1:.1%}"
            out(f"| {case.dialect} | {case.family} | {result.form} | {truth} | {numbers} |\n")
    return 0 if good else 1


def main() -> int:
    """Returns 0, 1 for a case that failed, 2 for bad input."""
    what = "Dialects times architectures against the truth, on SmolLM2-135M."
    return run_module("evidence.matrix", what, lambda _parser: None, run)


if __name__ == "__main__":
    raise SystemExit(main())
