"""The names of tensors, as trainers save them: the same model for us, and for transformers with our KEY_MAPPING."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from yarn_edge.checkpoint.tensor_names import KEY_MAPPING, is_computed
from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.errors import YarnEdgeError

from support import tiny

STATE = {name: values.contiguous() for name, values in tiny.tensors(tiny.config()).items()}


def bare(name: str) -> str:
    return name.removeprefix("model.")


# how the names are changed, and what the note says stands before all of them
SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "as they are": (lambda n: n, ""),
    "saved from the base class": (bare, ""),
    "some without model.": (lambda n: bare(n) if ".0." in n else n, ""),
    "lightning": (lambda n: "model." + n, ""),
    "ddp": (lambda n: "module." + n, "module"),
    "ddp of the base class": (lambda n: "module." + bare(n), "module"),
    "compiled": (lambda n: "_orig_mod." + n, "_orig_mod"),
    "compiled, then ddp": (lambda n: "module._orig_mod." + n, "module._orig_mod"),
    "ddp, then compiled": (lambda n: "_orig_mod.module." + n, "_orig_mod.module"),
    "only the base is compiled": (lambda n: n.replace("model.", "model._orig_mod."), ""),
    "layers compiled and checkpointed": (
        lambda n: n.replace("model.", "model._orig_mod.").replace(
            "layers.1.", "layers.1._orig_mod._checkpoint_wrapped_module."
        ),
        "",
    ),
    "fsdp": (
        lambda n: "_fsdp_wrapped_module." + n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        "_fsdp_wrapped_module",
    ),
    "peft": (lambda n: "base_model.model." + n, "base_model"),
    "peft, prompt tuning": (lambda n: "base_model." + n, "base_model"),
    "peft of a compiled model": (lambda n: "base_model.model._orig_mod." + n, "base_model"),
    "lightning with deepspeed": (lambda n: "_forward_module.model." + n, "_forward_module"),
}


def write(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(tiny.config()))
    save_file({name: values.clone() for name, values in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", SPELLINGS)
def test_every_spelling_is_the_same_model(case: str, tmp_path: Path) -> None:
    spelled, wrapper = SPELLINGS[case]
    write(tmp_path, {spelled(name): values for name, values in STATE.items()})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == STATE.keys()
    assert all(torch.equal(torch.from_numpy(checkpoint.tensors[n].float32()), v) for n, v in STATE.items())
    expected = [f"note: the names of all tensors begin with {wrapper}: read without it"] if wrapper else []
    assert list(checkpoint.notes) == expected
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, key_mapping=KEY_MAPPING, output_loading_info=True
    )
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    assert all(torch.equal(model.state_dict()[n], v) for n, v in STATE.items())


@pytest.mark.parametrize("case", ["as they are", "saved from the base class", "some without model.", "lightning"])
def test_no_note_where_transformers_loads_it_too(case: str, tmp_path: Path) -> None:
    write(tmp_path, {SPELLINGS[case][0](name): values for name, values in STATE.items()})
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path, STATE | {"norm.weight": STATE["model.norm.weight"] + 1})
    with pytest.raises(
        YarnEdgeError, match=r"tensors (model.)?norm.weight and (model.)?norm.weight are both model.norm.w"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("other", ["module.", "base_model.model.", "_orig_mod."])
def test_a_mixture_of_wrappers_is_refused(other: str, tmp_path: Path) -> None:
    write(tmp_path, {other + n if ".0." in n else n: v for n, v in STATE.items()})
    with pytest.raises(YarnEdgeError, match=r"begin in different ways .*: save the model without its wrapper"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name, shape, computed",
    [
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 64, 16), True),
        ("model.layers.0.self_attn.masked_bias", (), True),
        ("model.layers.0.self_attn.bias", (1, 1, 64, 64), True),
        ("model.layers.0.self_attn.bias", (64,), False),
        ("model.layers.0.self_attn.q_proj.bias", (64,), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (8,), False),
        ("model.causal_mask", (64, 64), True),
        ("model.embed_tokens.weight", (320, 64), False),
    ],
)
def test_what_transformers_computes_is_no_weight(name: str, shape: tuple[int, ...], computed: bool) -> None:
    assert is_computed(name, shape) is computed
