"""One file run in other ways: transformers with the same scaling, and files that were really patched, are the truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.bench.quality.sweep_plan import METHODS, attention_values, factor_values, method_values, runs_of
from yarn_edge.bench.scoring.evaluate import Scores, score, variant_context
from yarn_edge.bench.scoring.variants import Variant, parse_variant, scaled
from yarn_edge.bench.scoring.windows import Window
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.honoured import HONOURED
from yarn_edge.llama_rules.rescale import base_scaling, with_factor
from yarn_edge.positions.error_budget import rotation_error
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.rope_nodes import record_ropes
from yarn_edge.verify.transformers_reference import log_softmax, reference_logits

from support import tiny, tiny_gguf

N = 240


def nll_of(variant: Variant, tokens: list[int]) -> np.ndarray:
    scores = Scores.empty([Window(0, 0, tuple(tokens), 1)])
    with variant.load() as model, variant_context(model, replace(variant, kv_type="f32"), len(tokens)) as context:
        score(context, scores)
    return scores.nll[0]


@pytest.fixture(scope="module")
def tokens(smol_f32: Path) -> list[int]:
    with Model(smol_f32, vocab_only=True) as model:
        return model.tokenize(sample_text(), add_special=False, parse_special=False)[:N]


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("dynamic")])
def test_each_method_is_transformers_with_that_scaling(
    method: str, smol_f32: Path, smol_checkpoint: Path, tokens: list[int]
) -> None:
    """Original context 128, so that 240 tokens feel it."""
    kind, own = METHODS[method]
    base = replace(base_scaling(FilePositions(read_gguf(smol_f32))), original_context=128)
    goal = with_factor(base, 4.0, kind, own)
    ours = nll_of(scaled(Variant("v", read_gguf(smol_f32)), goal), tokens)
    logits = log_softmax(reference_logits(smol_checkpoint, tokens, goal))
    truth = -logits[np.arange(N - 1), tokens[1:]]
    np.testing.assert_allclose(ours, truth, atol=2e-3)
    assert abs(ours.mean() - truth.mean()) < 1e-5
    plain = nll_of(scaled(Variant("v", read_gguf(smol_f32)), with_factor(base, 1.0)), tokens)
    assert method == "plain" or np.abs(plain - ours).max() > 0.1  # it makes a difference


def test_an_attention_factor_of_ones_own(smol_f32: Path, smol_checkpoint: Path, tokens: list[int]) -> None:
    variant = parse_variant(f"{smol_f32}@yarn-attention-factor=1.3,yarn-beta-fast=8")
    goal = replace(base_scaling(FilePositions(read_gguf(smol_f32))), attention_factor=1.3, beta_fast=8.0)
    truth = -log_softmax(reference_logits(smol_checkpoint, tokens, goal))[np.arange(N - 1), tokens[1:]]
    np.testing.assert_allclose(nll_of(variant, tokens), truth, atol=2e-3)


def test_a_variant_is_the_file_that_patch_would_write(smol_f32: Path, tokens: list[int], tmp_path: Path) -> None:
    patched = tmp_path / "p.gguf"
    patch(smol_f32, patched, overrides=ScalingOverrides(factor=2.0))
    ours = nll_of(parse_variant(f"{smol_f32}@yarn-factor=2"), tokens)
    np.testing.assert_allclose(ours, nll_of(parse_variant(str(patched)), tokens), atol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours, nll_of(parse_variant(str(smol_f32)), tokens), atol=1e-3)


def test_words(smol_f32: Path, tmp_path: Path) -> None:
    found = parse_variant(f"{smol_f32}@kv=q4_0,backend=cpu")
    assert (found.path, found.kv_type, found.arguments) == (smol_f32, "q4_0", None)
    assert parse_variant(str(smol_f32), kv_type="q8_0").kv_type == "q8_0"
    assert parse_variant(f"{smol_f32}@kv=q8_0/q4_0").kv_type == "q8_0/q4_0"
    assert parse_variant(f"{smol_f32}@kv-v=q4_0,kv-k=q8_0").kv_type == "q8_0/q4_0"
    assert parse_variant(f"{smol_f32}@kv=q8_0,kv-k=f16", kv_type="f32").kv_type == "f16/q8_0"
    assert parse_variant(f"{smol_f32}@kv-v=q8_0", kv_type="q8_0/f16").kv_type == "q8_0"
    same = [parse_variant(f"{smol_f32}{s}").weights for s in ("", "@kv=q8_0", "@yarn-factor=2")]
    assert same[0] == same[1] == same[2]  # one loaded model is enough
    assert parse_variant(f"{smol_f32}@yarn-attention-factor=1.3").weights != same[0]
    odd = tmp_path / "name@kv=f32.gguf"
    odd.symlink_to(smol_f32)
    assert parse_variant(str(odd)).path == odd
    assert parse_variant(f"{odd}@kv=q8_0").kv_type == "q8_0"


BAD = {
    "@kv=q9": "'q9' is unknown; known: f32",
    "@cache=q8_0": "'cache' is unknown after @; known: kv, kv-k, kv-v, backend, lora, yarn-factor",
    "@kv=q8_0/q9": "'q8_0/q9' is unknown; known: f32",
    "@kv-k=q8_0/q4_0": "'q8_0/q4_0' is unknown; known: f32",
    "@kv-v=f16,kv-v=f32": "kv-v appears twice",
    "@kv=f16,kv=f32": "kv appears twice",
    "@yarn-factor=x": "'x' is not a number",
    "@yarn-factor=nan": "factor is nan",
    "@yarn-factor=0.5": "below 1",
    "@yarn-orig-ctx=1.5": "is not a number",
    "@backend=tpu": "'tpu' is unknown; known: cpu, cuda",
    "@kv=": "'' is unknown",
}


@pytest.mark.parametrize("suffix", BAD)
def test_bad_words(suffix: str, smol_f32: Path) -> None:
    with pytest.raises(YarnEdgeError, match=BAD[suffix]):
        parse_variant(f"{smol_f32}{suffix}")


def rotates(variant: Variant, goal: RopeScaling) -> bool:
    """Whether every ROPE node of a run rotates by `goal`."""
    pairing = HONOURED[variant.gguf.architecture].pairing
    with variant.load() as model:
        nodes = record_ropes(model, list(range(8)), [0, 900], variant.arguments, threads=1)
    return max(rotation_error(n.x, n.y, n.positions, goal, pairing).of_budget for n in nodes) <= 1


def test_a_file_with_baked_frequencies_runs_others_in_the_live_graph(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "ck")
    (baked,) = convert(checkpoint, str(tmp_path / "b.gguf"), "F32", planner=PlannerOptions("always"))
    variant = parse_variant(f"{baked}@yarn-factor=2")
    goal = with_factor(base_scaling(FilePositions(variant.gguf)), 2.0)
    assert variant.arguments is not None
    assert variant.arguments.live is not None
    assert rotates(variant, goal)
    assert not rotates(variant, replace(goal, factor=2.01))


def test_layers_that_take_their_scaling_from_the_file_alone(tmp_path: Path) -> None:
    """gpt-oss: arguments reach the layers with full attention only, the live graph reaches all."""
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}
    path = tiny_gguf.write(tmp_path / "m.gguf", "gpt-oss", keys)
    variant = parse_variant(f"{path}@yarn-factor=2")
    assert rotates(variant, with_factor(base_scaling(FilePositions(variant.gguf)), 2.0))
    assert parse_variant(f"{path}@yarn-attention-factor=1.2").overrides


def test_a_model_with_a_log_multiplier(tmp_path: Path) -> None:
    """mistral3: A is not 0.1 ln s + 1 before attn_factor multiplies it."""
    keys = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 256,
        "rope.scaling.yarn_log_multiplier": 1.0,
    }
    path = tiny_gguf.write(tmp_path / "m.gguf", "mistral3", keys)
    assert parse_variant(f"{path}@yarn-attention-factor=1.2").overrides


def test_the_files_own_attention_factor_stays(smol_f32: Path, tmp_path: Path) -> None:
    patch(
        smol_f32,
        tmp_path / "a.gguf",
        overrides=ScalingOverrides(attention_factor=1.35),
        planner=PlannerOptions("never"),
    )
    base = base_scaling(FilePositions(read_gguf(tmp_path / "a.gguf")))
    (value,) = factor_values(base, [4.0], 512)
    assert value.scaling(0).attention_factor == pytest.approx(1.35)
    (named,) = method_values(base, ["yarn"], 4.0)
    assert named.scaling(0).attention_factor == pytest.approx(1.35)


# ---- the values of a sweep


def test_values(smol_f32: Path) -> None:
    base = base_scaling(FilePositions(read_gguf(smol_f32)))
    assert [v.label for v in factor_values(base, None, 512)] == ["1", "2", "4"]
    labels = [v.number for v in attention_values(base, None)]
    assert len(labels) == 9
    assert base.attention_factor == pytest.approx(labels[4], abs=1e-4)
    assert labels[0] == 1
    assert [v.label for v in method_values(base, None, 4)] == ["plain", "pi", "ntk", "ntk-by-parts", "yarn"]
    with pytest.raises(YarnEdgeError, match="'yam' is unknown"):
        method_values(base, ["yam"], 4)
    plain = replace(base, method="none", factor=1.0, attention_factor=1.0)
    with pytest.raises(YarnEdgeError, match="the file has none, so pass --yarn-factor"):
        attention_values(plain, None)


def test_dynamic_runs_score_each_token_once_at_its_own_factor(smol_f32: Path) -> None:
    base = replace(base_scaling(FilePositions(read_gguf(smol_f32))), original_context=100)
    windows = [
        Window(0, 0, tuple(range(350)), 1),
        Window(1, 0, tuple(range(120)), 51),
        Window(2, 0, tuple(range(60)), 1),
    ]
    (value,) = method_values(base, ["dynamic-yarn"], 4.0)
    runs = runs_of(value, Variant("v", read_gguf(smol_f32)), windows, 100, 100)
    assert [max(len(w.tokens) for w in r.windows) for r in runs] == [100, 200, 300, 350]
    scored = [(w.document, i) for r in runs for w in r.windows for i in range(w.first, len(w.tokens))]
    assert sorted(scored) == [(w.document, i) for w in windows for i in range(w.first, len(w.tokens))]
    scales = [r.variant.arguments.rope_freq_scale for r in runs if r.variant.arguments]
    assert scales == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3.5])
