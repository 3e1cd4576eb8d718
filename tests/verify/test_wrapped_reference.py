"""The logits of a checkpoint whose language model stands inside a multimodal class are compared like any other's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import set_quiet
from yarn_edge.verify.command import verify
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import tiny_families, tiny_qwen3_vl
from support.made_once import Shelf
from support.tiny_families import ORIGINAL
from support.tiny_mistral3 import respelled, wrapped

N_TOKENS = 200
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(N_TOKENS)]
FEW = ["--tokens", str(N_TOKENS)]
QWEN_YARN = {**tiny_qwen3_vl.PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}


def _qwen(folder: Path, experts: bool = False) -> Path:
    made = tiny_qwen3_vl.model(QWEN_YARN, experts=experts)
    made.config.text_config.max_position_embeddings = 4 * ORIGINAL
    return tiny_qwen3_vl.write(folder, made)


# name -> (how the checkpoint is made, what stands before the tensors of its layers)
CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "mistral3": (wrapped, "language_model.model.layers."),
    "mistral3-tied": (lambda folder: wrapped(folder, tied=True), "language_model.model.layers."),
    "mistral3-in-memory": (lambda folder: respelled(wrapped(folder), "in memory"), "model.language_model.layers."),
    "qwen3_vl": (_qwen, "model.language_model.layers."),
    "qwen3_vl_moe": (
        lambda folder: tiny_qwen3_vl.as_published(_qwen(folder, experts=True)),
        "model.language_model.layers.",
    ),
}


@pytest.fixture(autouse=True)
def without_notes() -> None:
    set_quiet(True)


def prepared(name: str, shelf: Shelf) -> tuple[Path, str]:
    """(a folder with the checkpoint ck and its file out.gguf, what stands before the tensors of its layers)."""
    make, front = CHECKPOINTS[name]
    set_quiet(True)
    folder = shelf.made_once(
        f"wrapped-{name}", lambda folder: convert(make(folder / "ck"), str(folder / "out.gguf"), "F32")
    )
    return folder, front


@pytest.fixture(params=CHECKPOINTS)
def made(request: pytest.FixtureRequest, shelf: Shelf) -> tuple[Path, str]:
    return prepared(request.param, shelf)


@pytest.fixture(params=["mistral3", "qwen3_vl"])
def one_of_each(request: pytest.FixtureRequest, shelf: Shelf) -> tuple[Path, str]:
    return prepared(request.param, shelf)


def changed(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A checkpoint with other tensors."""
    state = tiny_families.saved(folder)
    change(state)
    tiny_families.rewrite(to, state, json.loads((folder / "config.json").read_text()))
    return to


def theirs(folder: Path) -> np.ndarray:
    """The logits of the whole multimodal model."""
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.inference_mode():
        return np.asarray(model(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy())


def test_the_reference_is_the_whole_models_text_streamed_or_not(made: tuple[Path, str]) -> None:
    whole, streamed = (reference_logits(made[0] / "ck", TOKENS, streamed=streamed) for streamed in (False, True))
    assert whole.std() > 0.1
    assert np.array_equal(whole, streamed)
    assert np.array_equal(whole, theirs(made[0] / "ck"))


def test_verify_passes_and_a_changed_weight_fails(
    one_of_each: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, front = one_of_each
    assert main(["verify", str(folder / "out.gguf"), "--against", str(folder / "ck"), *FEW, "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["logits"]["status"] == "pass"
    assert checks["logits"]["value"] < 1e-8
    other = changed(folder / "ck", tmp_path / "ck", lambda s: s[front + "1.mlp.up_proj.weight"].mul_(1.1))
    assert main(["verify", str(folder / "out.gguf"), "--against", str(other), *FEW]) == 1
    assert "fail  logits" in capsys.readouterr().out


def test_other_rope_keys_fail(one_of_each: tuple[Path, str], tmp_path: Path) -> None:
    folder, _front = one_of_each
    other = shutil.copytree(folder / "ck", tmp_path / "ck")
    values = json.loads((other / "config.json").read_text())
    values["text_config"]["rope_parameters"]["beta_fast"] = 4.0
    (other / "config.json").write_text(json.dumps(values))
    checks = {c.name: c.status for c in verify(folder / "out.gguf", other, n_tokens=N_TOKENS)}
    assert (checks["metadata"], checks["live-graph"], checks["logits"]) == ("fail", "fail", "fail")


@pytest.mark.parametrize("streamed", [False, True], ids=["in memory", "streamed"])
def test_a_missing_tensor_is_named_and_one_for_images_is_not_missed(
    streamed: bool, one_of_each: tuple[Path, str], tmp_path: Path
) -> None:
    folder, front = one_of_each
    name = front + "1.self_attn.k_proj.weight"
    other = changed(folder / "ck", tmp_path / "ck", lambda state: state.__delitem__(name))
    found = "does not find model.language_model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(YarnEdgeError, match=found):
        reference_logits(other, TOKENS, streamed=streamed)

    def drop_images(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if "vision" in key or "visual" in key]:
            del state[key]

    bare = changed(folder / "ck", tmp_path / "bare", drop_images)
    assert np.array_equal(reference_logits(bare, TOKENS, streamed=streamed), theirs(folder / "ck"))


def test_flags_replace_the_scaling_of_the_language_model(one_of_each: tuple[Path, str], tmp_path: Path) -> None:
    folder, _front = one_of_each
    flags = ["--yarn-factor", "8", "--yarn-orig-ctx", "32", "--yarn-attention-factor", "1.3"]
    path = tmp_path / "out.gguf"
    assert main(["convert", str(folder / "ck"), "-o", str(path), "--quant", "F32", *flags]) == 0
    assert main(["verify", str(path), "--against", str(folder / "ck"), *flags, *FEW]) == 0


@pytest.mark.parametrize("change", [{"vocab_size": 320.0}, {"tie_word_embeddings": 0}], ids=["float", "integer"])
def test_values_that_transformers_refuses(change: dict[str, object], tmp_path: Path) -> None:
    """They are read in the language model's part of the config as they are at the top of another."""
    folder = wrapped(tmp_path / "ck")
    before = reference_logits(folder, TOKENS)
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= change
    (folder / "config.json").write_text(json.dumps(values))
    assert divergence(before, reference_logits(folder, TOKENS)).kl_max == 0
