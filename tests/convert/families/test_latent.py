"""Latent attention: Mistral 4 inside its wrapper, Kimi's names and positions, layers that predict, groups of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import tiny_families
from support.made_once import Shelf
from support.tiny_families import ORIGINAL
from support.tiny_mistral3 import write_mistral4
from support.upstream_bytes import TYPES, digest

N_TOKENS = ORIGINAL + 160
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(N_TOKENS)]
MISTRAL4 = ("8183b183eb09bce7", "d4c00ccaf6933e74")  # by support.upstream_bytes


def logits_of(path: Path, arguments: RuntimeArguments | None = None) -> Any:
    settings = ContextSettings(256, N_TOKENS, kv_type="f32", arguments=arguments, attention="plain")
    with Model(path) as model, open_context(model, settings) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


def changed(folder: Path, to: Path, renamed: dict[str, str] | None = None, **values: Any) -> Path:
    """The checkpoint with other values in its config, and other beginnings of its tensors' names."""
    state = tiny_families.saved(folder)
    for old, new in (renamed or {}).items():
        state = {name.replace(old, new, 1) if name.startswith(old) else name: t for name, t in state.items()}
    config = {**json.loads((folder / "config.json").read_text()), **values}
    tiny_families.rewrite(to, state, config)
    return to


@pytest.fixture(scope="module")
def kimi(shelf: Shelf) -> Path:
    """A folder with the checkpoint ck, and its file out.gguf."""

    def make(folder: Path) -> None:
        convert(tiny_families.write(folder / "ck", "deepseek_v3-kimi"), str(folder / "out.gguf"), "F32")

    return shelf.made_once("kimi", make)


@pytest.fixture(scope="module")
def mistral4(shelf: Shelf) -> Path:
    """The same of Mistral 4 inside Mistral3ForConditionalGeneration."""

    def make(folder: Path) -> None:
        convert(write_mistral4(folder / "ck"), str(folder / "out.gguf"), "F32")

    return shelf.made_once("mistral4", make)


def test_mistral_4_scales_its_queries(mistral4: Path, tmp_path: Path) -> None:
    """llama.cpp reads both keys, and its own converter writes neither."""
    truth, path = reference_logits(mistral4 / "ck", TOKENS), mistral4 / "out.gguf"
    found = divergence(truth, logits_of(path))
    assert (found.kl_mean < 1e-7, found.top1) == (True, 1)
    keys = ("attention.temperature_scale", "attention.temperature_length")
    meta = read_gguf(path).metadata
    assert [meta[f"mistral4.{key}"] for key in keys] == [pytest.approx(0.1), ORIGINAL]
    without = tmp_path / "without.gguf"
    edit_gguf_files(read_gguf(path), [without], set_keys={}, remove_keys=[f"mistral4.{key}" for key in keys])
    assert divergence(truth, logits_of(without)).kl_mean > 0.01


def test_mistral_4_has_the_tensors_of_upstreams_converter(tmp_path: Path) -> None:
    paths = convert(write_mistral4(tmp_path / "ck", torch.bfloat16), str(tmp_path / "{quant}.gguf"), ",".join(TYPES))
    assert tuple(map(digest, paths)) == MISTRAL4


def test_verify_passes_for_latent_attention(mistral4: Path) -> None:
    command = ["verify", str(mistral4 / "out.gguf"), "--against", str(mistral4 / "ck"), "--tokens", "64"]
    assert main(command) == 0


def test_kimi_k2s_beta_fast_is_a_runtime_argument(kimi: Path, tmp_path: Path) -> None:
    assert read_gguf(kimi / "out.gguf").metadata["yarn_edge.rope.form"] == "arguments"
    truth = reference_logits(kimi / "ck", TOKENS)
    assert divergence(truth, logits_of(kimi / "out.gguf", FROM_MODEL)).kl_mean > 0.1
    with pytest.raises(YarnEdgeError, match="--positions portable: "):
        convert(kimi / "ck", str(tmp_path / "no.gguf"), "F32", planner=PlannerOptions(positions="portable"))


def test_kimi_under_its_own_names_is_the_same_file(kimi: Path, tmp_path: Path) -> None:
    """K2's model_type, and K2.5's class around it."""
    own = changed(kimi / "ck", tmp_path / "own" / "ck", model_type="kimi_k2", auto_map={"AutoConfig": "c.D"})
    around = tmp_path / "around" / "ck"
    state = {f"language_model.{name}": t for name, t in tiny_families.saved(kimi / "ck").items()}
    state |= {"vision_tower.patch_embed.proj.weight": torch.zeros(3), "mm_projector.proj.0.weight": torch.zeros(3)}
    text = json.loads((own / "config.json").read_text())
    names = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}
    tiny_families.rewrite(around, state, {**names, "tie_word_embeddings": False, "text_config": text})
    wanted = read_gguf(kimi / "out.gguf").metadata
    for folder in (own, around):
        path = convert(folder, str(folder.parent / "o.gguf"), "F32")[0]
        meta = read_gguf(path).metadata
        assert digest(path) == digest(kimi / "out.gguf")
        assert {k: v for k, v in meta.items() if k.startswith("deepseek2.")} == {
            k: v for k, v in wanted.items() if k.startswith("deepseek2.")
        }


def test_layers_after_the_last_are_left_out(kimi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(kimi / "ck", tmp_path / "ck")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    extra = {f"model.layers.4.{name}": torch.zeros(3) for name in ("eh_proj.weight", "self_attn.q_a_proj.weight")}
    config = json.loads((folder / "config.json").read_text())
    tiny_families.rewrite(folder, tiny_families.saved(folder) | extra, config)
    path = convert(folder, str(tmp_path / "o.gguf"), "F32")[0]
    assert "note: left out: 2 tensors of layers that predict further tokens" in capsys.readouterr().err
    assert digest(path) == digest(kimi / "out.gguf")
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(YarnEdgeError, match=r"tensor model\.layers\.4\..* has no place in the GGUF"):
        convert(folder, str(tmp_path / "x.gguf"), "F32")


def test_groups_of_experts_are_written_unless_all_are_used(tmp_path: Path) -> None:
    """llama.cpp ends the process if all are; those that it uses are in test_exact."""
    folder = tiny_families.write(tmp_path / "ck", "deepseek_v3")
    all_used = changed(folder, tmp_path / "all" / "ck", topk_group=4)
    some, every = (convert(ck, str(ck.parent / "o.gguf"), "F32")[0] for ck in (folder, all_used))
    keys = [f"deepseek2.expert_group_{key}" for key in ("count", "used_count")]
    assert [read_gguf(some).metadata[key] for key in keys] == [4, 2]
    assert not [key for key in keys if key in read_gguf(every).metadata]
    truth = reference_logits(all_used, TOKENS)
    assert divergence(truth, logits_of(every)).kl_mean < 1e-7
    assert divergence(truth, reference_logits(folder, TOKENS)).kl_mean > 1e-4


def test_queries_of_low_rank_are_not_for_the_small_shape(tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", "deepseek_v2", q_lora_rank=40, num_hidden_layers=26)
    with pytest.raises(YarnEdgeError, match=r"q_lora_rank is 40: llama\.cpp takes a model with 26 or 27 layers"):
        convert(folder, str(tmp_path / "x.gguf"), "F32")


def test_the_dense_layers_of_glm_are_the_first_without_a_list(tmp_path: Path) -> None:
    """As published: first_k_dense_replace and no mlp_layer_types."""
    folder = tiny_families.write(tmp_path / "ck", "glm4_moe_lite")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("mlp_layer_types") == ["dense", "sparse", "sparse", "sparse"]
    paths = [convert(folder, str(tmp_path / "one.gguf"), "F32")[0]]
    for values in ({}, {"first_k_dense_replace": 1}):
        (folder / "config.json").write_text(json.dumps({**config, **values}))
        paths.append(convert(folder, str(tmp_path / f"o{len(values)}.gguf"), "F32")[0])
    assert len({path.read_bytes() for path in paths}) == 1


def test_mistral_4_rotates_a_part_of_a_fixed_size(mistral4: Path, tmp_path: Path) -> None:
    """Its partial_rotary_factor is a share of both parts of a head, and says no more than qk_rope_head_dim."""
    text = json.loads((mistral4 / "ck" / "config.json").read_text())["text_config"]
    rope = {k: v for k, v in text["rope_parameters"].items() if k != "partial_rotary_factor"}
    bare = changed(mistral4 / "ck", tmp_path / "bare" / "ck", text_config={**text, "rope_parameters": rope})
    path = convert(bare, str(tmp_path / "o.gguf"), "F32")[0]
    assert read_gguf(path).metadata["mistral4.rope.dimension_count"] == text["qk_rope_head_dim"]
    quarter = {**text, "rope_parameters": {**rope, "partial_rotary_factor": 0.25}}
    with pytest.raises(YarnEdgeError, match=r"qk_rope_head_dim makes it 16: which one is right\?"):
        convert(
            changed(mistral4 / "ck", tmp_path / "quarter" / "ck", text_config=quarter), str(tmp_path / "x.gguf"), "F32"
        )
