"""Dialects that transformers does not read (the Nous code, params.json, TeleChat), dynamic scaling, and the families' tables.

The authors' formulas are written out here, from jquesnelle/yarn's scaled_rope/modeling_{llama,mistral}_yarn.py, llama.cpp's
conversion/mistral.py and vLLM's telechat3_scaling_rope.py.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from yarn_edge.checkpoint import families
from yarn_edge.checkpoint.config_file import ConfigFile, read_config
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.positions import rope

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}
NOUS = {"auto_map": {"AutoModelForCausalLM": "modeling_llama_yarn.LlamaForCausalLM"}}
DYNAMIC = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
DYNAMIC_YARN = (
    LLAMA
    | NOUS
    | {
        "rope_scaling": {
            "type": "dynamic-yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 4096,
            "finetuned": False,
        }
    }
)


def read(config, flags=None, freeze_at=None):
    return read_scaling(ConfigFile("config.json", config), ScalingOverrides(**(flags or {}), freeze_at=freeze_at))


def authors_yarn(dim, base, origin, scale, fast, slow):
    """YaRNScaledRotaryEmbedding.yarn of the authors' code, pair by pair."""
    low, high = (dim * math.log(origin / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (fast, slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
    high += 0.001 if low == high else 0
    found = []
    for d in range(dim // 2):
        mask = 1 - min(1, max(0, (d - low) / (high - low)))
        found.append((1 - mask) / (scale * base ** (2 * d / dim)) + mask / base ** (2 * d / dim))
    return found


def test_nous_mistral_has_its_own_betas_and_log_multiplier():
    got = read(
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "max_position_embeddings": 131072,
            "auto_map": {"AutoModelForCausalLM": "modeling_mistral_yarn.MistralForCausalLM"},
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 8192,
                "finetuned": True,
            },
        }
    )
    np.testing.assert_allclose(rope.inv_freq(got), authors_yarn(128, 1e4, 8192, 16, 128, 2), rtol=1e-12)
    assert got.attention_factor == pytest.approx(0.07 * math.log(16) + 1, rel=1e-15)
    assert got.provenance["beta_fast"] == "the default of Nous Mistral"


def test_telechat3():
    got = read(
        {
            "model_type": "telechat3",
            "hidden_size": 6144,
            "num_attention_heads": 48,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "auto_map": {"AutoModelForCausalLM": "modeling_telechat3.TeleChat3ForCausalLM"},
            "rope_scaling": {"type": "telechat3-yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        }
    )
    np.testing.assert_allclose(rope.inv_freq(got), authors_yarn(128, 1e6, 8192, 4, 32, 1), rtol=1e-12)
    assert got.attention_factor == pytest.approx(0.07 * math.log(4) + 1, rel=1e-15)


def test_deepseek_yarn_is_yarn():
    block = {"factor": 4.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 1.0}
    one, other = (read(LLAMA | {"rope_scaling": block | {"type": t}}) for t in ("yarn", "deepseek_yarn"))
    assert one == other


TOGETHER = LLAMA | {
    "max_position_embeddings": 32768,
    "rope_scaling": {"factor": 8.0, "type": "linear"},
    "auto_map": {"AutoModelForCausalLM": "togethercomputer/LLaMA-2-7B-32K--modeling_flash_llama.LlamaForCausalLM"},
}


@pytest.mark.parametrize("flags, context", [({}, 32768), ({"original_context": 32768}, 262144)], ids=["", "told"])
def test_together_llama_2_32k_does_not_state_its_origin(flags, context):
    got = read(TOGETHER, flags)
    assert (got.method, got.factor, got.extended_context, got.attention_factor) == ("linear", 8.0, context, 1.0)
    np.testing.assert_allclose(rope.inv_freq(got), [1e4 ** (-d / 64) / 8 for d in range(64)], rtol=1e-12)


# ---- dynamic scaling


@pytest.mark.parametrize("length", [1000, 4096, 6000, 16384])
@pytest.mark.parametrize("config", [DYNAMIC, DYNAMIC | NOUS], ids=["transformers", "nous"])
def test_frozen_dynamic_ntk_is_transformers_at_that_length(config, length):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs, a = ROPE_INIT_FUNCTIONS["dynamic"](LlamaConfig.from_dict({**DYNAMIC}), "cpu", seq_len=length)
    assert read(config).method == "dynamic-ntk"
    np.testing.assert_allclose(rope.inv_freq(read(config), length), theirs.double().numpy(), rtol=5e-7)
    got = read(config, freeze_at=length)
    np.testing.assert_allclose(rope.inv_freq(got), theirs.double().numpy(), rtol=5e-7)
    assert got.method == "ntk"
    assert got.attention_factor == a == 1.0
    assert length - got.factor <= got.extended_context <= length
    assert got.provenance["factor"] == f"--freeze-at {length}"


@pytest.mark.parametrize("model, multiplier, fast, slow", [("llama", 0.1, 32, 1), ("mistral", 0.07, 128, 2)])
@pytest.mark.parametrize("length", [2048, 12288, 40000])
def test_frozen_dynamic_yarn_is_the_authors(model, multiplier, fast, slow, length):
    config = DYNAMIC_YARN | {"model_type": model, "auto_map": {"AutoModelForCausalLM": f"modeling_{model}_yarn.X"}}
    assert read(config).method == "dynamic-yarn"
    got = read(config, freeze_at=length)
    s = max(1, length / 4096)
    np.testing.assert_allclose(rope.inv_freq(got), authors_yarn(128, 1e4, 4096, s, fast, slow), rtol=1e-12)
    assert got.attention_factor == pytest.approx(multiplier * math.log(s) + 1, rel=1e-15)
    assert (got.method, got.original_context, got.extended_context) == ("yarn", 4096, max(4096, length))
    assert got.provenance["attention_factor"] == f"--freeze-at {length}"


LONG = {
    "model_type": "phi3",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": 1024,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


@pytest.mark.parametrize(
    "length, table, context", [(512, 1.0, 1024), (1024, 1.0, 1024), (1025, 2.0, 8192), (8192, 2.0, 8192)]
)
def test_freezing_longrope_takes_the_table_for_that_context(length, table, context):
    with pytest.raises(YarnEdgeError, match=r"allocated context \(up to 1024 tokens, beyond 1024 tokens\)"):
        read(LONG)
    got = read(LONG, freeze_at=length)
    assert got.frequency_factors == (table,) * 8
    assert got.extended_context == context
    assert read_positions(ConfigFile("config.json", LONG)).dialect == "LongRoPE"


# ---- Mistral's params.json

PARAMS = {
    "dim": 4096,
    "n_layers": 34,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 131072,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 262144,
    "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
    "yarn": {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1},
}
MINISTRAL = {
    "model_type": "mistral3",
    "text_config": {
        "model_type": "ministral3",
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}


def folder(tmp_path, **files):
    for name, values in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    return read_config(tmp_path)


@pytest.mark.parametrize("apply_scale", [True, False])
def test_params_json_alone(tmp_path, apply_scale):
    yarn = PARAMS["yarn"] | {"apply_scale": apply_scale, "beta": 16, "alpha": 2}
    positions = read_positions(folder(tmp_path, params=PARAMS | {"yarn": yarn}))
    got = positions.parts[""]
    assert positions.dialect == "Mistral params.json"
    assert (got.method, got.beta_fast, got.beta_slow, got.dim, got.rope_theta) == ("yarn", 16.0, 2.0, 128, 1e6)
    assert got.attention_factor == pytest.approx(0.1 * math.log(16) + 1 if apply_scale else 1, rel=1e-15)
    assert got.extended_context == 262144
    assert got.provenance["beta_fast"] == "params.json: yarn.beta"
    assert "llama_4_scaling" in positions.notes[0]


def test_both_files_must_agree(tmp_path):
    assert read_scaling(folder(tmp_path, params=PARAMS, config=MINISTRAL)).attention_factor == 1.0
    other = PARAMS | {"yarn": PARAMS["yarn"] | {"factor": 8, "original_max_position_embeddings": 32768}}
    with pytest.raises(YarnEdgeError) as caught:
        read_scaling(folder(tmp_path, params=other))
    assert (
        "factor is 16.0 (config.json: text_config.rope_parameters.factor), but 8.0 in params.json: yarn.factor"
        in str(caught.value)
    )
    assert "remove params.json" in str(caught.value)


def test_metas_params_json_is_not_mistrals(tmp_path):
    assert folder(tmp_path, params={"dim": 4096, "multiple_of": 256, "n_heads": 32}, config=LLAMA).params is None


# ---- layer types, notes, sections

NESTED = {
    "full_attention": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_a_model_that_uses_one_layer_type_has_one_scaling():
    config = LLAMA | {"layer_types": ["full_attention"] * 4, "rope_parameters": NESTED}
    with pytest.raises(YarnEdgeError, match="layer_types names full_attention: add layer_types"):
        read(config)
    config["rope_parameters"] = {"full_attention": NESTED["full_attention"]}
    assert read(config).factor == 2.0
    config = LLAMA | {"model_type": "laguna", "layer_types": ["full_attention"], "rope_parameters": NESTED}
    positions = read_positions(ConfigFile("config.json", config))
    assert list(positions.parts) == ["full_attention"]
    assert "sliding_attention is for a layer type that the model does not have" in positions.notes[-1]


def test_layers_that_differ_are_named():
    config = LLAMA | {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": NESTED}
    with pytest.raises(YarnEdgeError, match=r"layer type \(full_attention, sliding_attention\)"):
        read(config)
    alike = dict.fromkeys(NESTED, NESTED["full_attention"])
    assert read(config | {"rope_parameters": alike}).factor == 2.0


def test_flags_are_for_the_one_scaled_layer_type():
    """Gemma 3 is published without the origin of its linear scaling."""
    config = ConfigFile(
        "config.json",
        {
            "model_type": "gemma3_text",
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    )
    assert "pass --yarn-orig-ctx 131072" in read_positions(config).assumptions[0]
    assert read_positions(config).parts["full_attention"].extended_context == 131072
    parts = read_positions(config, ScalingOverrides(original_context=16384)).parts
    assert (parts["full_attention"].extended_context, parts["sliding_attention"].rope_theta) == (131072, 1e4)
    with pytest.raises(YarnEdgeError, match="flags cannot say which one they mean"):
        read_positions(ConfigFile("config.json", {**config.values, "rope_scaling": None}), ScalingOverrides(factor=2.0))


def test_notes_and_section_are_told():
    positions = read_positions(ConfigFile("config.json", MINISTRAL))
    assert positions.dialect == "transformers v5"
    assert any("text_config.rope_parameters.llama_4_scaling_beta 0.1: queries" in note for note in positions.notes)
    assert positions.parts[""].provenance["factor"] == "config.json: text_config.rope_parameters.factor"
    window = LLAMA | {"sliding_window": 128}
    assert "sliding_window 128" in read_positions(ConfigFile("config.json", window)).notes[0]
    assert read_positions(ConfigFile("config.json", window | {"use_sliding_window": False})).notes == ()


# ---- the tables of families, against every configuration class of transformers


def test_default_thetas_and_head_dims_are_transformers():
    """Every class that is known here; the two bases of a dict are those of full and of sliding attention."""
    transformers = pytest.importorskip("transformers")
    for name, theta in families.ROPE_THETAS.items():
        default = transformers.CONFIG_MAPPING[name].default_theta
        assert theta == (default["global"] if isinstance(default, dict) else default), name
        if isinstance(default, dict):
            assert families.LAYERS[name].local_theta == default["local"], name
    for name, dim in families.HEAD_DIMS.items():
        assert transformers.CONFIG_MAPPING[name].head_dim == dim, name


def of(model_type):
    return ConfigFile("config.json", {"model_type": model_type})


@pytest.mark.parametrize("name", sorted(families.PARTIAL.keys() - {"bamba", "recurrent_gemma"}))
def test_default_partial_rotation_is_transformers(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.CONFIG_MAPPING[name].from_dict({})
    found = config.rope_parameters["partial_rotary_factor"]
    assert families.PARTIAL[name] == found


def test_every_text_family_with_a_theta_of_its_own_has_a_row():
    """A family that the table lacks would be read with base 10000."""
    transformers = pytest.importorskip("transformers")
    known = {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "phi3",
        "olmo2",
        "deepseek_v3",
        "gpt_oss",
        "smollm3",
        "cohere",
        "mixtral",
        "ernie4_5",
        "exaone4",
        "granite",
        "minimax_m2",
        "seed_oss",
        "apertus",
        "olmo3",
        "lfm2",
    }
    for name in known:
        theta = transformers.CONFIG_MAPPING[name].default_theta
        assert families.family_of(of(name)).rope_theta == theta, name


@pytest.mark.parametrize(
    "factor, low, high, origin", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 0.5, 16.0, 2048)]
)
def test_llama3_factors(factor, low, high, origin):
    """Meta's apply_scaling, wavelength by wavelength."""
    got = rope.llama3_factors(128, 500000.0, origin, factor, low, high)
    for d, value in enumerate(got):
        freq = 500000.0 ** (-2 * d / 128)
        wavelength = 2 * math.pi / freq
        if wavelength < origin / high:
            want = freq
        elif wavelength > origin / low:
            want = freq / factor
        else:
            smooth = (origin / wavelength - low) / (high - low)
            want = (1 - smooth) * freq / factor + smooth * freq
        assert freq / value == pytest.approx(want, rel=1e-12)
