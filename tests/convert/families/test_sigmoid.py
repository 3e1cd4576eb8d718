"""Laguna, GLM-4.5 and Ling 2.0 beyond what every family shows: how positions are carried, what is left out, Ling by its makers' formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import depth, tiny_bailing, tiny_families
from support.llama_quantize import assert_same_file, upstream
from support.upstream_bytes import TYPES, digest

TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(tiny_families.ORIGINAL + 160)]


def logits_of(path: Path, arguments: RuntimeArguments | None = None) -> np.ndarray[Any, Any]:
    settings = ContextSettings(256, len(TOKENS), kv_type="f32", arguments=arguments, attention="plain")
    with Model(path) as model, open_context(model, settings) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


def test_laguna_as_published_needs_runtime_arguments_for_its_betas_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """XS.2: attention_factor 1.0 stands in the file; the betas do not."""
    folder = tiny_families.write(tmp_path / "ck", "laguna")
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    meta = read_gguf(path).metadata
    assert meta["yarn_edge.rope.form"] == "arguments"
    assert meta["laguna.rope.scaling.attn_factor"] == pytest.approx(1 / (0.1 * np.log(4) + 1))
    assert meta["laguna.attention.head_count"].tolist() == [4, 6, 6, 6]
    keys = ("dimension_count", "dimension_count_swa", "freq_base", "freq_base_swa")
    assert [meta[f"laguna.rope.{key}"] for key in keys] == [16, 32, 100.0, 10000.0]
    truth = reference_logits(folder, TOKENS)
    assert divergence(truth, logits_of(path, FROM_MODEL)).kl_mean > 0.1
    assert main(["verify", str(path), "--against", str(folder), "--tokens", "64"]) == 0
    found = {}
    for model in (path, folder):
        capsys.readouterr()
        assert main(["inspect", str(model), "--json"]) == 0
        found[model] = [one["name"] for one in json.loads(capsys.readouterr().out)["findings"]]
    assert found == {path: ["other positions"], folder: []}


def test_laguna_with_other_layers_is_what_the_pattern_says(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    folder = tiny_families.write(tmp_path / "ck", "laguna", layer_types=types)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert read_gguf(path).metadata["laguna.attention.sliding_window_pattern"].tolist() == [False, True, False, True]
    assert divergence(reference_logits(folder, TOKENS), logits_of(path)).kl_mean < 1e-7


def test_what_predicts_further_tokens_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.write(tmp_path / "ck", "glm4_moe")
    state, values = tiny_families.saved(folder), json.loads((folder / "config.json").read_text())
    assert values["num_nextn_predict_layers"] == 1
    alone = digest(convert(folder, str(tmp_path / "alone.gguf"), "F32")[0])
    further = {"eh_proj.weight": torch.zeros(64, 128), "self_attn.q_proj.weight": torch.zeros(128, 64)}
    state |= {f"model.layers.4.{name}": value for name, value in further.items()}
    tiny_families.rewrite(tmp_path / "more" / "ck", state, values)
    capsys.readouterr()
    path = convert(tmp_path / "more" / "ck", str(tmp_path / "out.gguf"), "F32")[0]
    assert "left out: 2 tensors of layers that predict further tokens" in capsys.readouterr().err
    assert digest(path) == alone
    assert read_gguf(path).metadata["glm4moe.block_count"] == 4


# ---- Ling 2.0, against support.tiny_bailing

LING: dict[str, dict[str, Any]] = {
    "as published": {},
    "tied": {"tie_word_embeddings": True},
    "two shared experts": {
        "num_shared_experts": 2,
        "moe_shared_expert_intermediate_size": 96,
        "first_k_dense_replace": 2,
    },
    "one expert of one group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("case", LING)
def test_ling_is_what_its_makers_formulas_give(case: str, tmp_path: Path) -> None:
    folder = tiny_bailing.write(tmp_path / "ck", **LING[case])
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    found = divergence(tiny_bailing.logits(folder, TOKENS), logits_of(path))
    assert found.kl_mean < 1e-7
    assert found.top1 == 1


@pytest.mark.skipif(not depth.full, reason="needs --full")
def test_the_formulas_see_what_they_are_to_see(tmp_path: Path) -> None:
    """Each of these changes the logits by much more than llama.cpp is off."""
    folder = tiny_bailing.write(tmp_path / "ck")
    truth = tiny_bailing.logits(folder, TOKENS[:96])
    changes: tuple[dict[str, Any], ...] = (
        {"topk_group": 4},
        {"partial_rotary_factor": 1.0},
        {"routed_scaling_factor": 1.0},
        {"rope_scaling": {**tiny_bailing.YARN, "factor": 8.0}},
    )
    for i, change in enumerate(changes):
        other = tiny_bailing.write(tmp_path / str(i) / "ck", **change)
        assert divergence(truth, tiny_bailing.logits(other, TOKENS[:96])).kl_mean > 1e-5


def test_lings_tensors_and_types_are_llama_cpps(tmp_path: Path) -> None:
    """The digests are those of support.upstream_bytes."""
    folder = tiny_bailing.write(tmp_path / "ck", torch.bfloat16)
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), ",".join(TYPES))
    assert tuple(map(digest, paths)) == ("4d7b2c5f46172e47", "1b24738e6988e9fb")
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    wide |= {"moe_intermediate_size": 256, "moe_shared_expert_intermediate_size": 256}
    folder = tiny_bailing.write(tmp_path / "wide" / "ck", torch.bfloat16, **wide)
    base, ours = convert(folder, str(tmp_path / "wide-{quant}.gguf"), "BF16,Q4_K_M")
    assert_same_file(ours, upstream(base, tmp_path / "theirs.gguf", "Q4_K_M"))


def test_ling_with_yarn_by_flags_is_ling_with_yarn(tmp_path: Path) -> None:
    """Published configs have none; the card's flags, with the origin of the tiny model."""
    scaled = tiny_bailing.write(tmp_path / "scaled" / "ck")
    bare = tiny_bailing.write(tmp_path / "bare" / "ck", rope_scaling=None, max_position_embeddings=64)
    flags = ScalingOverrides(factor=4.0, original_context=64)
    one = convert(scaled, str(tmp_path / "one.gguf"), "F16")[0]
    other = convert(bare, str(tmp_path / "other.gguf"), "F16", overrides=flags)[0]
    a, b = read_gguf(one).metadata, read_gguf(other).metadata
    rope = [key for key in a if ".rope." in key and "provenance" not in key]
    assert {key: a[key] for key in rope} == {key: b[key] for key in rope}


def test_lings_further_layer_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(64, 128)}
    folder = tiny_bailing.write(tmp_path / "ck", extra=extra, num_nextn_predict_layers=1)
    path = convert(folder, str(tmp_path / "out.gguf"), "F16")[0]
    assert "left out: 1 tensors of layers that predict further tokens" in capsys.readouterr().err
    assert read_gguf(path).metadata["bailingmoe2.block_count"] == 4


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"rope_theta": ...}, "rope_theta is missing, and transformers does not know this family"),
    "no share": ({"partial_rotary_factor": ...}, "partial_rotary_factor is missing, and transformers does not"),
    "biases": ({"use_qkv_bias": True}, "llama.cpp has no place for the biases of attention"),
    "no norms": ({"use_qk_norm": False}, "llama.cpp has these norms in every model"),
    "softmax": ({"score_function": "softmax"}, "only 'sigmoid' can be converted"),
    "shared width": (
        {"moe_shared_expert_intermediate_size": 96},
        "moe_shared_expert_intermediate_size is 96: only 48 can be converted: the makers' code ignores it",
    ),
    "groups": ({"n_group": 3}, "n_group is 3: the experts must be in groups of one size"),
    "few groups": ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6: more than the groups of topk_group have"),
    "width": ({"head_dim": 32}, "llama.cpp runs bailingmoe2 only if heads * head_dim is the hidden size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_ling_that_llama_cpp_would_run_otherwise(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = REFUSED[case]
    folder = tiny_bailing.write(tmp_path / "ck", **changes)
    assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "x.gguf").exists()


def test_another_bailing_is_refused_by_its_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_bailing.write(tmp_path / "ck", architectures=["BailingMoeForCausalLM"])
    assert main(["convert", str(folder), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    assert "architectures is 'BailingMoeForCausalLM', which convert does not support" in capsys.readouterr().err


def test_inspect_and_verify_know_ling_and_say_that_it_has_no_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_bailing.write(tmp_path / "ck")
    assert main(["inspect", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["findings"], shown["plans"][""]["form"]) == ([], "native")
    path = convert(folder, str(tmp_path / "out.gguf"), "F16")[0]
    assert main(["verify", str(path)]) == 0
    capsys.readouterr()
    assert main(["verify", str(path), "--against", str(folder)]) == 2
    assert "transformers cannot load it" in capsys.readouterr().err
