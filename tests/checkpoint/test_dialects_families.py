"""Families whose configuration class does something of its own: another name of the base, a scaling where there is none, layers.

Held against the classes of transformers themselves.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from yarn_edge.checkpoint import families
from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.llama_rules.honoured import CHECKPOINT_ARCHITECTURES
from yarn_edge.positions import rope

LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "max_position_embeddings": 4096}


def read(config):
    return read_scaling(ConfigFile("config.json", config))


def rotary_of(config):
    """transformers' configuration class on this config, and inv_freq of its rotary embedding."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

    theirs = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    return GPTNeoXRotaryEmbedding(theirs).inv_freq.double().numpy()


@pytest.mark.parametrize(
    "values, source",
    [
        ({"rotary_emb_base": 1000000, "rotary_pct": 0.25}, "config.json: rotary_emb_base"),
        ({"rotary_emb_base": 25000.0, "rope_theta": 25000}, "config.json: rotary_emb_base"),
        (
            {
                "rotary_emb_base": 5e5,
                "max_position_embeddings": 16384,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            },
            "config.json: rotary_emb_base",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}, "config.json: rope_parameters.rope_theta"),
        ({}, "transformers' default for gpt_neox"),
    ],
    ids=["base", "both alike", "yarn", "v5", "none"],
)
def test_gpt_neox_has_another_name_for_the_base(values, source):
    config = LLAMA | {"model_type": "gpt_neox"} | values
    got = read(config)
    np.testing.assert_allclose(rope.inv_freq(got), rotary_of(config), rtol=2e-6)
    assert got.provenance["rope_theta"] == source


def scales(block):
    """Whether a block of transformers, nested or not, is more than plain RoPE; "axial" is for pictures."""
    inner = [value for value in block.values() if isinstance(value, dict)] or [block]
    return any(part.get("rope_type", "default") not in ("default", "axial") for part in inner)


def test_a_missing_block_is_refused_where_transformers_fills_in_a_scaling():
    transformers = pytest.importorskip("transformers")
    tables = (
        families.ROPE_THETAS,
        families.HEAD_DIMS,
        families.PARTIAL,
        families.LAYERS,
        families.LATENT,
        families._OTHERS,
    )
    known = set(CHECKPOINT_ARCHITECTURES).union(families.DEFAULT_BLOCKS, *tables) & set(transformers.CONFIG_MAPPING)
    assert len(known) > 80
    defaults = {}
    for name in known:
        block = getattr(transformers.CONFIG_MAPPING[name](), "rope_parameters", None) or {}
        if scales(block):
            defaults[name] = block
    assert {name: json.loads(text) for name, text in families.DEFAULT_BLOCKS.items()} == defaults
    assert {"gpt_oss", "ministral3", "apertus"} <= defaults.keys()
    for name in defaults:
        config = {"model_type": name, "hidden_size": 1024, "num_attention_heads": 8, "max_position_embeddings": 4096}
        for more in ({}, {"rope_scaling": None}, {"rope_scaling": {}}, {"rope_parameters": None, "rope_theta": 1e4}):
            with pytest.raises(YarnEdgeError) as caught:
                read_positions(ConfigFile("config.json", config | more))
            assert f"rope_scaling is missing: transformers 5 then fills in its own scaling for {name}" in str(
                caught.value
            )
            assert families.DEFAULT_BLOCKS[name] in str(caught.value)


@pytest.mark.parametrize("name", ["apertus", "cwm", "gpt_oss", "ministral3"])
def test_the_block_that_the_message_names_can_be_added(name):
    block = json.loads(families.DEFAULT_BLOCKS[name])
    context = block.get("max_position_embeddings", round(block["original_max_position_embeddings"] * block["factor"]))
    config = LLAMA | {"model_type": name, "head_dim": 128, "max_position_embeddings": context}
    assert read(config | {"rope_parameters": block}).method == block["rope_type"]
    plain = {"rope_type": "default"}
    assert read(config | {"rope_parameters": plain}).method == read(config | {"rope_scaling": plain}).method == "none"


@pytest.mark.parametrize("name", ["olmo3", "gemma3_text", "gemma3n_text"])
def test_transformers_loses_truncate_of_a_flat_block(name):
    """Why it is refused: the frequencies are those without it."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    block = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    found = []
    for more in ({}, {"truncate": False}):
        theirs = transformers.CONFIG_MAPPING[name].from_dict(
            {"max_position_embeddings": 16384, "rope_scaling": block | more}
        )
        found.append(ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu", layer_type="full_attention")[0].double().numpy())
    np.testing.assert_array_equal(*found)
