"""Configs as published, against the rotary classes of transformers or the authors' formulas written out."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.positions import rope

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

LLAMA_2 = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0}
DEEPSEEK = {
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
}
PHI_AUTO = {
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
}
# Tables as long as the published ones; the numbers are of their kind (rising from 1).
SHORT48, LONG48 = [1 + 0.02 * i for i in range(48)], [1.1 + i * i / 40 for i in range(48)]
LAYERS = ["sliding_attention"] * 3 + ["full_attention"]
YARN_FULL = {
    "attention_factor": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 64.0,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.5,
    "rope_theta": 500000.0,
    "rope_type": "yarn",
}
QWEN35 = {
    "model_type": "qwen3_5_text",
    "hidden_size": 5120,
    "num_attention_heads": 24,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 64,
    "full_attention_interval": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 16,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 48,
    "mtp_num_hidden_layers": 1,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}

PUBLISHED = {
    "Yarn-Llama-2-7b-64k": LLAMA_2 | {
        "max_position_embeddings": 65536,
        "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        "rope_scaling": {"factor": 16.0, "finetuned": True, "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen3-8B": {
        "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "rope_theta": 1000000, "sliding_window": None,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "Qwen3-8B to 131072": {
        "model_type": "qwen3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 1000000,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
        "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 163840, "rope_theta": 10000, "auto_map": {
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "DeepSeek-V3": DEEPSEEK | {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 163840, "rope_theta": 10000,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "Kimi-K2": DEEPSEEK | {
        "model_type": "kimi_k2", "hidden_size": 7168, "num_attention_heads": 64, "num_key_value_heads": 64,
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "max_position_embeddings": 131072, "rope_theta": 50000.0,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "initial_context_length": 4096, "rope_theta": 150000, "sliding_window": 128,
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                         "rope_type": "yarn", "truncate": False},
    },
    "OLMo-3-7B": {
        "model_type": "olmo3", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 65536,
        "num_hidden_layers": 4, "rope_theta": 500000, "sliding_window": 4096, "layer_types": LAYERS,
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    },
    "Ministral-3": {
        "model_type": "mistral3", "text_config": {
            "model_type": "ministral3", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "max_position_embeddings": 262144, "sliding_window": None,
            "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384, "rope_theta": 1000000.0,
                "rope_type": "yarn", "type": "yarn"},
        },
    },
    "Laguna": {
        "model_type": "laguna", "hidden_size": 2048, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "num_hidden_layers": 4, "layer_types": LAYERS, "sliding_window": 512,
        "rope_parameters": {"full_attention": YARN_FULL, "sliding_attention": {
            "partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"}},
    },
    # XS.2: the original context is beside the layer types too, and the top level has the share that full attention rotates.
    "Laguna-XS.2": {
        "model_type": "laguna", "hidden_size": 2048, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 262144, "num_hidden_layers": 4, "layer_types": LAYERS[::-1], "sliding_window": 512,
        "partial_rotary_factor": 0.5, "num_attention_heads_per_layer": [48, 64, 64, 64], "gating": True,
        "auto_map": {"AutoModelForCausalLM": "modeling_laguna.LagunaForCausalLM"},
        "rope_parameters": {"full_attention": YARN_FULL | {"beta_fast": 64.0}, "original_max_position_embeddings": 4096,
            "sliding_attention": {"partial_rotary_factor": 1.0, "rope_theta": 10000.0, "rope_type": "default"}},
    },
    "Laguna, full attention alone": {
        "model_type": "laguna", "hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 262144, "num_hidden_layers": 4, "sliding_window": 0, "gating": "per-element",
        "rope_parameters": {"full_attention": YARN_FULL | {"beta_fast": 64.0, "partial_rotary_factor": 1.0}},
    },
    "GLM-4.5-Air": {
        "model_type": "glm4_moe", "hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "rope_theta": 1000000, "rope_scaling": None,
        "num_hidden_layers": 46, "num_nextn_predict_layers": 1,
    },
    "Solar-Open-100B": {
        "model_type": "solar_open", "hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "partial_rotary_factor": 1.0, "rope_theta": 1000000,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536},
    },
    "gemma-3-4b": {
        "model_type": "gemma3", "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "num_attention_heads": 8, "head_dim": 256, "num_hidden_layers": 6,
            "max_position_embeddings": 131072, "rope_theta": 1000000.0, "rope_local_base_freq": 20000.0, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear", "original_max_position_embeddings": 16384},
        },
    },
    "Phi-3-mini-128k": PHI_AUTO | {
        "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 32, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {"long_factor": LONG48, "short_factor": SHORT48, "type": "longrope"},
    },
    "Phi-4-mini": PHI_AUTO | {
        "model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "rope_scaling": {"long_factor": LONG48, "short_factor": SHORT48, "type": "longrope"},
    },
    "Llama-3.1-8B": LLAMA_2 | {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "Kimi-K2.5": {
        "model_type": "kimi_k25", "architectures": ["KimiK25ForConditionalGeneration"], "text_config": {
            "model_type": "kimi_k2", "hidden_size": 7168, "num_attention_heads": 64, "num_key_value_heads": 64,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 262144,
            "rope_theta": 50000.0, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 64.0, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        },
    },
    "GLM-4.7-Flash": {
        "model_type": "glm4_moe_lite", "hidden_size": 2048, "num_attention_heads": 20, "num_key_value_heads": 20,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256, "max_position_embeddings": 202752,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "rope_scaling": None,
        "rope_theta": 1000000,
    },
    "Youtu-LLM-2B": {
        "model_type": "youtu", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 131072,
        "rope_interleave": True, "rope_scaling": None, "rope_theta": 1600000,
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16, "head_dim": 256, "full_attention_interval": 4,
        "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_scaling": None, "max_position_embeddings": 262144,
    },
    "Qwen3.5-27B": {"model_type": "qwen3_5", "text_config": QWEN35},
    "Qwen3.5-27B, the card's YaRN": {
        "model_type": "qwen3_5", "text_config": {**QWEN35, "rope_parameters": {
            **QWEN35["rope_parameters"], "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}},
    },
    "Mistral-Small-4": {
        "model_type": "mistral3", "text_config": {
            "model_type": "mistral4", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
            "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "qk_head_dim": 128, "v_head_dim": 128,
            "max_position_embeddings": 1048576,
            "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 128.0, "llama_4_scaling_beta": 0.1,
                "max_position_embeddings": 1048576, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8192, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
                "rope_type": "yarn", "type": "yarn"},
        },
    },
    "AFM-4.5B": {
        "model_type": "arcee", "hidden_size": 2560, "num_attention_heads": 20, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 65536, "rope_theta": 10000.0,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn", "type": "yarn"},
    },
    "GLM-4-9B": {
        "model_type": "glm4", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
        "max_position_embeddings": 32768, "partial_rotary_factor": 0.5, "rope_theta": 10000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
}  # fmt: skip
# name -> fields of a part ("" or a layer type or a context)
WANT = {
    "Yarn-Llama-2-7b-64k": {"": {"factor": 16.0, "finetuned": True, "attention_factor": 0.1 * math.log(16) + 1}},
    "Qwen2.5-7B": {"": {"original_context": 32768, "factor": 4.0, "dim": 128}},
    "Qwen3-8B": {"": {"original_context": 32768, "factor": 4.0, "extended_context": 131072}},
    "Qwen3-8B to 131072": {"": {"original_context": 32768, "factor": 4.0, "extended_context": 131072}},
    "DeepSeek-V2-Lite": {"": {"dim": 64, "attention_factor": 1.0, "softmax_factor": (0.0707 * math.log(40) + 1) ** 2}},
    "DeepSeek-V3": {"": {"dim": 64, "attention_factor": 1.0, "softmax_factor": (0.1 * math.log(40) + 1) ** 2}},
    "Kimi-K2": {"": {"dim": 64, "rope_theta": 50000.0, "beta_fast": 1.0, "softmax_factor": (0.1 * math.log(32) + 1) ** 2}},
    "gpt-oss-20b": {"": {"truncate": False, "rope_theta": 150000.0, "dim": 64}},
    "OLMo-3-7B": {"full_attention": {"method": "yarn", "factor": 8.0}, "sliding_attention": {"method": "none"}},
    "Ministral-3": {"": {"attention_factor": 1.0, "softmax_factor": 1.0, "original_context": 16384}},
    "Laguna": {"full_attention": {"method": "yarn", "dim": 64, "attention_factor": 1.0},
               "sliding_attention": {"method": "none", "dim": 128, "rope_theta": 10000.0}},
    "Laguna-XS.2": {"full_attention": {"dim": 64, "attention_factor": 1.0, "beta_fast": 64.0, "original_context": 4096},
                    "sliding_attention": {"method": "none", "dim": 128, "rope_theta": 10000.0}},
    "Laguna, full attention alone": {"full_attention": {"dim": 128, "attention_factor": 1.0, "beta_fast": 64.0}},
    "GLM-4.5-Air": {"": {"method": "none", "dim": 64, "rope_theta": 1000000.0}},
    "Solar-Open-100B": {"": {"method": "yarn", "dim": 128, "factor": 2.0, "original_context": 65536}},
    "gemma-3-4b": {"full_attention": {"method": "linear"}, "sliding_attention": {"method": "none", "rope_theta": 20000.0}},
    "Phi-3-mini-128k": {"up to 4096 tokens": {"attention_factor": math.sqrt(1 + math.log(32) / math.log(4096))},
                        "beyond 4096 tokens": {"extended_context": 131072}},
    "Phi-4-mini": {"up to 4096 tokens": {"dim": 96}, "beyond 4096 tokens": {"dim": 96}},
    "Llama-3.1-8B": {"": {"method": "llama3", "extended_context": 131072}},
    "AFM-4.5B": {"": {"factor": 20.0, "original_context": 4096, "extended_context": 65536, "declared_context": 65536}},
    "GLM-4-9B": {"": {"dim": 64}},
    "Kimi-K2.5": {"": {"dim": 64, "beta_fast": 32.0, "softmax_factor": (0.1 * math.log(64) + 1) ** 2}},
    "GLM-4.7-Flash": {"": {"dim": 64, "method": "none", "rope_theta": 1e6}},
    "Youtu-LLM-2B": {"": {"dim": 64, "method": "none", "rope_theta": 1.6e6}},
    "Qwen3-Next-80B-A3B": {"": {"dim": 64, "method": "none", "rope_theta": 1e7}},
    "Qwen3.5-27B": {"": {"dim": 64, "method": "none", "rope_theta": 1e7}},
    "Qwen3.5-27B, the card's YaRN": {"": {"dim": 64, "factor": 4.0, "extended_context": 1048576,
                                          "attention_factor": 0.1 * math.log(4) + 1}},
    "Mistral-Small-4": {"": {"dim": 64, "attention_factor": 1.0, "softmax_factor": (0.1 * math.log(128) + 1) ** 2,
                             "original_context": 8192}},
}  # fmt: skip


def text_of(config):
    return config.get("text_config", config)


def class_of(config):
    name = {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
    plain = {k: v for k, v in copy.deepcopy(config).items() if k not in ("auto_map", "model_type")}
    return transformers.CONFIG_MAPPING[name].from_dict(plain)


def theirs(config, part):
    """(inverse frequencies, attention factor) that transformers has for one part."""
    if part.startswith(("up to", "beyond")):
        length = int(part.split()[-2]) + part.startswith("beyond")
        return ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", seq_len=length)
    module = __import__(f"transformers.models.{config.model_type.removesuffix('_text')}", fromlist=["x"])
    modeling = getattr(module, f"modeling_{config.model_type.removesuffix('_text')}")
    name = next(n for n in dir(modeling) if n.endswith("RotaryEmbedding") and "Vision" not in n)
    embedding = getattr(modeling, name)(config)
    prefix = f"{part}_" if part else ""
    return getattr(embedding, f"{prefix}inv_freq"), getattr(embedding, f"{prefix}attention_scaling")


@pytest.mark.parametrize("name", WANT)
def test_published_configs_are_what_transformers_computes(name):
    config = PUBLISHED[name]
    parts = read_positions(ConfigFile("config.json", config)).parts
    assert parts.keys() == WANT[name].keys()
    reference = class_of(text_of(config))
    for part, fields in WANT[name].items():
        for field, value in fields.items():
            assert getattr(parts[part], field) == (
                pytest.approx(value, rel=1e-14) if isinstance(value, float) else value
            )
        inv_freq, attention = theirs(reference, part)
        # float32: see test_rope.float32_budget
        np.testing.assert_allclose(
            rope.inv_freq(parts[part]), inv_freq.double().numpy(), rtol=2.0**-24 * (8 + 2 * parts[part].factor)
        )
        assert parts[part].attention_factor == pytest.approx(attention, rel=1e-12)
        assert parts[part].effective_fields().keys() - {"ramp", "softmax_factor"} <= parts[part].provenance.keys()


@pytest.mark.parametrize("name", ["DeepSeek-V2-Lite", "DeepSeek-V3"])
def test_softmax_factor_is_what_the_attention_class_multiplies_by(name):
    import torch
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = class_of(PUBLISHED[name])
    with torch.device("meta"):
        attention = (DeepseekV2Attention if "V2" in name else DeepseekV3Attention)(config, 0)
    scaling = read_scaling(ConfigFile("config.json", PUBLISHED[name]))
    assert scaling.softmax_factor == pytest.approx(attention.scaling * math.sqrt(192), rel=1e-12)


@pytest.mark.parametrize(
    "mscales", [{"mscale": 2.0}, {"mscale_all_dim": 0.5}, {"mscale": 0.707, "mscale_all_dim": 1.0}], ids=str
)
def test_one_mscale_alone_is_transformers_without_code_and_refused_with_it(mscales):
    config = PUBLISHED["DeepSeek-V3"]
    block = {k: v for k, v in config["rope_scaling"].items() if not k.startswith("mscale")} | mscales
    bare = {k: v for k, v in config.items() if k != "auto_map"} | {"rope_scaling": block}
    got = read_scaling(ConfigFile("config.json", bare))
    reference = class_of(bare)
    assert got.attention_factor == pytest.approx(theirs(reference, "")[1], rel=1e-12)
    assert got.softmax_factor == pytest.approx(
        (1 + 0.1 * mscales.get("mscale_all_dim", 0) * math.log(40)) ** 2, rel=1e-12
    )
    named = ConfigFile("config.json", config | {"rope_scaling": block})
    if len(mscales) == 2:
        assert read_scaling(named).attention_factor == got.attention_factor
    else:
        with pytest.raises(
            YarnEdgeError, match=r"config.json: rope_scaling.mscale\w* is .* is None: the DeepSeek code"
        ):
            read_scaling(named)
