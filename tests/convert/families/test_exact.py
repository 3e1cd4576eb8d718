"""Every family against transformers, and its tensors against those of llama.cpp's own converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_scaling
from yarn_edge.cli import main
from yarn_edge.convert.families.architectures import ARCHITECTURES
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import FROM_MODEL, RuntimeArguments
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import gpt_oss, tiny_families
from support.tiny_families import DEEPSEEK, FAMILIES, ORIGINAL, YARN
from support.upstream_bytes import TYPES, digest

N_TOKENS = ORIGINAL + 160
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(N_TOKENS)]
# By support.upstream_bytes, with llama.cpp as vendored by llama-cpp-python 0.3.36.
UPSTREAM = {
    "llama": ("7c957db34f619b58", "2832824a4545635d"),
    "mistral": ("fbe66e728325cbd7", "7cfcd14ac63d4cb7"),
    "qwen2": ("0f8e2c8c012ea765", "f85bb5d979682ed8"),
    "qwen3": ("16088c155ca7d793", "b89f6ff44f4db74b"),
    "cohere": ("3844de275a8ddda6", "178cc9dee88f4037"),
    "cohere2": ("3844de275a8ddda6", "178cc9dee88f4037"),
    "cohere-plus": ("4bec34f71205e037", "2653a2eb854233b5"),
    "qwen3_moe": ("b137c5ead06fe562", "db011aa1ec79e96f"),
    "qwen2_moe": ("5ad349b3805f4605", "e1005bf0c4bf92a0"),
    "mixtral": ("86431dcd67b08c77", "93eb80495caf0977"),
    "granitemoe": ("2ed4821c5c4c8067", "aca1157cc17761e0"),
    "granite": ("d19276fdc9186545", "a1802d121a9dcdb7"),
    "phi3": ("e00b7aeadb99171f", "720f0bb9a340663c"),
    "phi3-partial": ("e00b7aeadb99171f", "720f0bb9a340663c"),
    "olmo2": ("fad05183aa8dc7c1", "958462da256b0f04"),
    "olmo3": ("fad05183aa8dc7c1", "958462da256b0f04"),
    "mellum": ("b137c5ead06fe562", "db011aa1ec79e96f"),
    "smollm3": ("e047e7211ba169e0", "6f3c3e53d0e2757d"),
    "smollm3-tied": ("20a6360bec9928db", "a832b2840c117d94"),
    "arcee": ("3afc4e429541f177", "9d7bc6d9180bcdd4"),
    "glm4": ("8980ca28dcaccc42", "ebfed73db10347c8"),
    "ministral3": ("fbe66e728325cbd7", "7cfcd14ac63d4cb7"),
    "devstral2": ("fbe66e728325cbd7", "7cfcd14ac63d4cb7"),
    "ministral3-baked": ("fbe66e728325cbd7", "7cfcd14ac63d4cb7"),
    "ministral3-mscale": ("fbe66e728325cbd7", "7cfcd14ac63d4cb7"),
    "gpt_oss": ("10d4437782cb2029", "d77dbe5b4da94eaf"),
    "deepseek_v2": ("ffb31d91c593e021", "4c6b3dc66fc53b66"),
    "deepseek_v2-lite": ("8df22b1aa72e8df7", "e813f052a09581b3"),
    "deepseek_v3": ("17551554c627df93", "300033ffa1e502fa"),
    "deepseek_v3-kimi": ("df924a9a96006d80", "ab0a7536d9230ba2"),
    "glm4_moe_lite": ("17551554c627df93", "300033ffa1e502fa"),
    "youtu": ("82f50218535dca0f", "82d491f4442772dc"),
    "laguna": ("b980bdb6735924f4", "451acdcf5829207e"),
    "laguna-m1": ("5a77191933602106", "a3247016c4dbe7f1"),
    "glm4_moe": ("919e0569f5a3d677", "4a27082ead16e1ba"),
    "glm4_moe-groups": ("f396982529563e0d", "ee7028db0b139ab6"),
    "solar_open": ("5afb664e2b55922a", "9fc56de51132488c"),
    "qwen3_next": ("2e45a920a03249c6", "167ceeb47e425f85"),
    "qwen3_5": ("6cfc54b7b7bfe1a2", "2c24905e85e7d1f6"),
    "qwen3_5_moe": ("609af50940be180f", "a14089ebbe8d8470"),
    "gemma3": ("4ba73bb6c2d00fa0", "d1d62e734bc23150"),
}


def test_every_row_has_a_tiny_checkpoint() -> None:
    inside_others = {"qwen3_vl_text", "qwen3_vl_moe_text", "mistral4", "bailing_moe_v2"}  # support.tiny_*
    found = {model_type for model_type, _config in FAMILIES.values()} | inside_others
    assert found == {row.model_type for row in ARCHITECTURES}


def logits_of(path: Path, arguments: RuntimeArguments | None = None) -> np.ndarray[Any, Any]:
    settings = ContextSettings(256, N_TOKENS, kv_type="f32", arguments=arguments, attention="plain")
    with Model(path) as model, open_context(model, settings) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_logits_are_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", name)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    found = divergence(reference_logits(folder, TOKENS), logits_of(path))
    assert found.kl_mean < 1e-7
    assert found.top1 == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tensors_are_those_of_upstreams_converter(name: str, tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", name, torch.bfloat16)
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), ",".join(TYPES))
    assert tuple(digest(path) for path in paths) == UPSTREAM[name]


OWN_BASE = {
    "full_attention": {**YARN, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
DELTA_YARN = {**YARN, "partial_rotary_factor": 0.25}
LIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "mellum, own base for windows": ("mellum", {"rope_parameters": OWN_BASE}),
    "olmo3, own base for windows": ("olmo3", {"rope_parameters": OWN_BASE}),
    "qwen3_moe, truncate false": ("qwen3_moe", {"rope_parameters": {**YARN, "truncate": False}}),
    "smollm3, truncate false": ("smollm3", {"rope_parameters": {**YARN, "truncate": False}}),
    "gpt_oss, as published": (
        "gpt_oss",
        {"rope_parameters": gpt_oss.PUBLISHED, "max_position_embeddings": 131072, "head_dim": 64},
    ),
    "deepseek_v3, truncate false": ("deepseek_v3", {"rope_parameters": {**DEEPSEEK, "truncate": False}}),
    "qwen3_5, truncate false": ("qwen3_5", {"rope_parameters": {**DELTA_YARN, "truncate": False}}),
    "glm4, truncate false": ("glm4", {"rope_parameters": {**YARN, "truncate": False, "partial_rotary_factor": 0.5}}),
}


@pytest.mark.parametrize("name", LIVE)
def test_what_no_file_can_carry_is_exact_in_the_live_graph(name: str, tmp_path: Path) -> None:
    family, changes = LIVE[name]
    folder = tiny_families.write(tmp_path / "ck", family, **changes)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert read_gguf(path).metadata["yarn_edge.rope.form"] == "live"
    truth = reference_logits(folder, TOKENS)
    assert divergence(truth, logits_of(path)).kl_mean < 1e-7
    assert divergence(truth, logits_of(path, FROM_MODEL)).kl_mean > 1e-6
    with pytest.raises(YarnEdgeError, match="--positions portable: "):
        convert(folder, str(tmp_path / "no.gguf"), "F32", planner=PlannerOptions(positions="portable"))


# Families whose model cards have YaRN as an option, with the flags of the card (the origin is that of the tiny model).
BY_FLAGS = {
    "qwen3_moe": 4.0,
    "qwen2_moe": 4.0,
    "mixtral": 4.0,
    "smollm3": 2.0,
    "glm4": 4.0,
    "granite": 4.0,
    "granitemoe": 4.0,
    "olmo2": 4.0,
    "cohere": 4.0,
    "cohere2": 4.0,
    "qwen3_next": 4.0,
    "qwen3_5": 4.0,
}


@pytest.mark.parametrize("name", BY_FLAGS)
def test_flags_do_what_the_block_does(name: str, tmp_path: Path) -> None:
    block = {**FAMILIES[name][1].get("rope_parameters", YARN), "factor": BY_FLAGS[name]}
    plain = {k: v for k, v in block.items() if k in ("rope_theta", "partial_rotary_factor")} | {"rope_type": "default"}
    scaled = tiny_families.write(tmp_path / "scaled" / "ck", name, rope_parameters=block)
    bare = tiny_families.write(tmp_path / "bare" / "ck", name, rope_parameters=plain, max_position_embeddings=ORIGINAL)
    flags = ScalingOverrides(factor=BY_FLAGS[name], original_context=ORIGINAL)
    one = convert(scaled, str(tmp_path / "one.gguf"), "F16")[0]
    other = convert(bare, str(tmp_path / "other.gguf"), "F16", overrides=flags)[0]
    a, b = read_gguf(one).metadata, read_gguf(other).metadata
    rope = [key for key in a if ".rope." in key and "provenance" not in key]
    assert {key: str(a[key]) for key in rope} == {key: str(b[key]) for key in rope}
    assert digest(one) == digest(other)


def test_phi_3_with_yarn_by_flags(tmp_path: Path) -> None:
    """In a Phi-3 config the word yarn means LongRoPE, so transformers gets the frequencies."""
    folder = tiny_families.write(tmp_path / "ck", "phi3", max_position_embeddings=ORIGINAL)
    flags = ScalingOverrides(factor=4.0, original_context=ORIGINAL)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=flags)[0]
    truth = reference_logits(folder, TOKENS, read_scaling(read_config(folder), flags))
    assert divergence(truth, logits_of(path)).kl_mean < 1e-7
    assert divergence(reference_logits(folder, TOKENS), logits_of(path)).kl_mean > 1e-3


@pytest.mark.parametrize("name", ["glm4", "phi3-partial"])
def test_flags_leave_the_rest_of_a_head_unrotated_in_the_reference(name: str, tmp_path: Path) -> None:
    own = FAMILIES[name][1]["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": own["partial_rotary_factor"]}
    folder = tiny_families.write(tmp_path / "ck", name, rope_parameters=plain, max_position_embeddings=ORIGINAL)
    flags = ScalingOverrides(factor=4.0, original_context=ORIGINAL)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=flags)[0]
    truth = reference_logits(folder, TOKENS, read_scaling(read_config(folder), flags))
    assert divergence(truth, logits_of(path)).kl_mean < 1e-7


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mellum", "mixtral", "deepseek_v3", "qwen3_5_moe"])
def test_experts_in_one_tensor_are_the_same_file(name: str, tmp_path: Path) -> None:
    """The layout that transformers has in memory, and that some repositories have on disk."""
    folder = tiny_families.write(tmp_path / "each" / "ck", name)
    model = tiny_families.model(name)
    values = json.loads((folder / "config.json").read_text())
    state = dict(model.state_dict())
    router = {k.replace("mlp.gate.", "block_sparse_moe.gate.") if name == "mixtral" else k: v for k, v in state.items()}
    assert "model.layers.3.mlp.experts.gate_up_proj" in router
    tiny_families.rewrite(tmp_path / "fused" / "ck", router, values)
    one = convert(folder, str(tmp_path / "one.gguf"), "Q8_0")[0]
    other = convert(tmp_path / "fused" / "ck", str(tmp_path / "other.gguf"), "Q8_0")[0]
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("name", ["olmo3", "mellum", "gemma3", "cohere2"])
def test_layers_with_a_window_are_those_of_the_config(name: str, tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    folder = tiny_families.write(tmp_path / "ck", name, layer_types=types)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    file = read_gguf(path)
    prefix = f"{file.architecture}.attention.sliding_window"
    assert file.metadata[prefix] == 24
    assert file.metadata[prefix + "_pattern"].tolist() == [True, False, False, True]
    assert divergence(reference_logits(folder, TOKENS), logits_of(path)).kl_mean < 1e-7


def test_without_layer_types_gemma_3_has_its_period(tmp_path: Path) -> None:
    """Published configs have sliding_window_pattern and no layer_types."""
    folder = tiny_families.write(tmp_path / "ck", "gemma3", layer_types=["sliding_attention", "full_attention"] * 2)
    values = json.loads((folder / "config.json").read_text())
    del values["layer_types"], values["_sliding_window_pattern"]
    (folder / "config.json").write_text(json.dumps({**values, "sliding_window_pattern": 2}))
    meta = read_gguf(convert(folder, str(tmp_path / "out.gguf"), "F32")[0]).metadata
    assert meta["gemma3.attention.sliding_window_pattern"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["mellum", "olmo3"])
def test_a_model_whose_layers_all_have_full_attention_has_no_window(name: str, tmp_path: Path) -> None:
    changes = {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {"full_attention": YARN, "sliding_attention": YARN},
    }
    folder = tiny_families.write(tmp_path / "ck", name, **changes)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert not [key for key in read_gguf(path).metadata if "sliding" in key]
    assert divergence(reference_logits(folder, TOKENS), logits_of(path)).kl_mean < 1e-7


TWICE = ("devstral2", "deepseek_v2", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe")  # with the head of another row here


@pytest.mark.parametrize("name", [name for name in FAMILIES if "-" not in name and name not in TWICE])
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    """Some architectures are not loaded without an output matrix."""
    folder = tiny_families.write(tmp_path / "ck", name, tie_word_embeddings=True)
    assert "lm_head.weight" not in tiny_families.saved(folder)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert divergence(reference_logits(folder, TOKENS), logits_of(path)).kl_mean < 1e-7


def test_a_router_stays_in_float32(tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", "qwen2_moe", torch.bfloat16)
    types = {n: t.type_name for n, t in read_gguf(convert(folder, str(tmp_path / "o.gguf"), "Q8_0")[0]).tensors.items()}
    assert {types[f"blk.{i}.{n}.weight"] for i in range(4) for n in ("ffn_gate_inp", "ffn_gate_inp_shexp")} == {"F32"}


def test_verify_passes_and_inspect_finds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.write(tmp_path / "ck", "glm4")
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert main(["verify", str(path), "--against", str(folder)]) == 0
    capsys.readouterr()
    for model in (path, folder):
        assert main(["inspect", str(model), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["findings"] == []


def test_a_context_that_the_makers_state_stays_below_what_the_factor_reaches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AFM-4.5B: 65536 of 20 * 4096; here 200 of 4 * 64. In other families such a value is left from before the extension."""
    folder = tiny_families.write(tmp_path / "ck", "arcee", max_position_embeddings=200)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert main(["verify", str(path), "--against", str(folder)]) == 0
    assert main(["verify", str(path)]) == 0
    again, longer, repaired = (tmp_path / f"{name}.gguf" for name in ("again", "longer", "repaired"))
    assert main(["patch", str(path), "-o", str(again), "--from", str(folder)]) == 0
    assert main(["patch", str(path), "-o", str(longer), "--yarn-factor", "8"]) == 0
    assert main(["patch", str(longer), "-o", str(repaired), "--repair"]) == 0
    for file, context, declared in ((path, 200, 200), (again, 200, 200), (longer, 512, None), (repaired, 512, None)):
        capsys.readouterr()
        assert main(["inspect", str(file), "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert (shown["wanted"]["extended_context"], shown["findings"]) == (context, [])
        meta = read_gguf(file).metadata
        assert (meta["arcee.context_length"], meta.get("yarn_edge.rope.declared_context")) == (context, declared)
    other = tiny_families.write(tmp_path / "other" / "ck", "qwen3_moe", max_position_embeddings=200)
    assert read_gguf(convert(other, str(tmp_path / "o.gguf"), "F16")[0]).metadata["qwen3moe.context_length"] == 256


class HalfPrecisionGelu(torch.nn.Module):
    """ggml's GELU of float32 on the CPU: both sides rounded to half precision, up to 10."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, rounded, torch.relu(x))


def test_what_gemma_3_is_off_is_ggmls_gelu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_families.write(tmp_path / "ck", "gemma3")
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    model = tiny_families.model("gemma3")
    for layer in model.model.layers:
        layer.mlp.act_fn = HalfPrecisionGelu()
    with torch.inference_mode():
        rounded = np.asarray(model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy(), np.float32)
    ours = logits_of(path)
    assert divergence(rounded, ours).kl_mean < 2e-9
    assert divergence(reference_logits(folder, TOKENS), ours).kl_mean > 2e-8
    assert main(["verify", str(path), "--against", str(folder), "--tokens", "64"]) == 0
    assert "2e-05 of the limit are for ggml's GELU" in capsys.readouterr().out
