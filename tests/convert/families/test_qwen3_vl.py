"""Qwen3-VL's text part: every pair turns with the position, which its own sections do not let llama.cpp do."""

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
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.rescale import in_memory
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.command import verify
from yarn_edge.verify.transformers_reference import _replace_rotary, divergence

from support import tiny_families
from support.made_once import Shelf
from support.tiny_families import ORIGINAL
from support.tiny_qwen3_vl import PLAIN, model, write
from support.upstream_bytes import TYPES, digest

N_TOKENS = ORIGINAL + 160
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(N_TOKENS)]
YARN = {"factor": 4.0, "original_context": ORIGINAL}
# By support.upstream_bytes.
UPSTREAM = ("f1dde3ea1a8ad7cf", "471a8fbc90de34f5")


def truth(made: Any) -> np.ndarray[Any, Any]:
    with torch.inference_mode():
        return np.asarray(made(torch.tensor([TOKENS]), use_cache=False).logits[0].numpy(), np.float32)


def logits_of(path: Path) -> np.ndarray[Any, Any]:
    settings = ContextSettings(256, N_TOKENS, kv_type="f32", attention="plain")
    with Model(path) as opened, open_context(opened, settings) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


@pytest.fixture(scope="module")
def scaled(shelf: Shelf) -> Path:
    """A folder with the checkpoint ck, and its file of YaRN by flags, out.gguf."""

    def make(folder: Path) -> None:
        ck = write(folder / "ck", model(PLAIN))
        convert(ck, str(folder / "out.gguf"), "F32", overrides=ScalingOverrides(**YARN))

    return shelf.made_once("qwen3-vl", make)


@pytest.fixture(scope="module")
def reference(scaled: Path) -> np.ndarray[Any, Any]:
    made = model(PLAIN)
    _replace_rotary(made.model.language_model, read_scaling(read_config(scaled / "ck"), ScalingOverrides(**YARN)))
    return truth(made)


def with_own_sections(source: Path, output: Path) -> Path:
    """The file as llama.cpp's converter writes it: the config's sections, layers for image features, no description."""
    keys = [key for key in read_gguf(source).metadata if key.startswith("yarn_edge.")]
    sections = {"qwen3vl.rope.dimension_sections": [24, 20, 20, 0]}
    edit_gguf_files(read_gguf(source), [output], set_keys=sections, remove_keys=keys)
    return output


def test_text_is_transformers_text(scaled: Path, reference: np.ndarray[Any, Any]) -> None:
    meta = read_gguf(scaled / "out.gguf").metadata
    assert meta["qwen3vl.rope.dimension_sections"].tolist() == [22, 21, 21, 0]
    assert (meta["yarn_edge.rope.form"], meta["qwen3vl.context_length"]) == ("native", 4 * ORIGINAL)
    assert not [key for key in meta if "deepstack" in key]
    found = divergence(reference, logits_of(scaled / "out.gguf"))
    assert found.kl_mean < 1e-7
    assert found.top1 == 1


def test_the_tensors_are_those_of_upstreams_converter(tmp_path: Path) -> None:
    folder = write(tmp_path / "ck", model(PLAIN).to(torch.bfloat16))
    assert tuple(digest(p) for p in convert(folder, str(tmp_path / "{quant}.gguf"), ",".join(TYPES))) == UPSTREAM


def test_a_block_in_the_config_is_what_flags_do(reference: np.ndarray[Any, Any], tmp_path: Path) -> None:
    block = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    made = model(block)
    made.config.text_config.max_position_embeddings = 4 * ORIGINAL
    path = convert(write(tmp_path / "ck", made), str(tmp_path / "out.gguf"), "F32")[0]
    assert divergence(truth(made), logits_of(path)).kl_mean < 1e-7
    assert divergence(truth(made), reference).kl_mean < 1e-9


def test_its_own_sections_leave_two_pairs_still_and_that_is_told(
    scaled: Path, reference: np.ndarray[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = with_own_sections(scaled / "out.gguf", tmp_path / "theirs.gguf")
    assert divergence(reference, logits_of(theirs)).kl_mean > 1e-3
    stopped = np.asarray(FilePositions(read_gguf(theirs)).effective().frequency_factors)
    assert np.flatnonzero(stopped > 1).tolist() == [61, 62]
    assert main(["inspect", str(theirs), "--json"]) == 0
    assert "frequencies up to 100.00% off (pair 61)" in json.dumps(json.loads(capsys.readouterr().out)["findings"])
    checks = {c.name: c for c in verify(theirs)}
    assert checks["live-graph"].status == "fail"
    assert "runs sections (24, 20, 20, 0), expected (22, 21, 21, 0)" in checks["live-graph"].detail
    with pytest.raises(
        YarnEdgeError, match="theirs: this file cannot run yarn scaling with these values: frequencies up to"
    ):
        in_memory(FilePositions(read_gguf(theirs)), FilePositions(read_gguf(scaled / "out.gguf")).wanted, "theirs")
    patched = patch(theirs, tmp_path / "patched.gguf", checkpoint=scaled / "ck", overrides=ScalingOverrides(**YARN))
    assert divergence(reference, logits_of(patched[0][0])).kl_mean < 1e-7


def test_live_positions(tmp_path: Path) -> None:
    block = {
        **PLAIN,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
        "truncate": False,
    }
    made = model(block)
    made.config.text_config.max_position_embeddings = 4 * ORIGINAL
    folder = write(tmp_path / "ck", made)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    assert read_gguf(path).metadata["yarn_edge.rope.form"] == "live"
    assert divergence(truth(made), logits_of(path)).kl_mean < 1e-7
    assert {c.status for c in verify(path)} <= {"pass", "skip"}
    with pytest.raises(YarnEdgeError, match="--positions portable: "):
        convert(folder, str(tmp_path / "no.gguf"), "F32", planner=PlannerOptions(positions="portable"))


def test_verify_passes_and_the_rest_is_told(scaled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(scaled / "out.gguf")]) == 0
    capsys.readouterr()
    assert main(["convert", str(scaled / "ck"), "-o", str(tmp_path / "out.gguf"), "--quant", "F16"]) == 0
    told = capsys.readouterr().err
    assert "only the language model is converted; left out: visual (" in told
    assert "note: the file is for text alone: " in told
    for path in (scaled / "ck", tmp_path / "out.gguf"):
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["findings"] == []


def test_tied_embeddings(tmp_path: Path) -> None:
    made = model(PLAIN, tied=True)
    path = convert(write(tmp_path / "ck", made), str(tmp_path / "out.gguf"), "F32")[0]
    assert "output.weight" not in read_gguf(path).tensors
    assert divergence(truth(made), logits_of(path)).kl_mean < 1e-7


# what is changed in the text_config, and what convert says
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu': only 'silu' can be converted"),
    "bias": ({"attention_bias": True}, "text_config.attention_bias is True: only False can be converted"),
    "another model": ({"model_type": "qwen3"}, "inside Qwen3VLForConditionalGeneration convert supports qwen3_vl_text"),
    "mrope by type": (
        {"rope_scaling": {"rope_type": "mrope"}, "rope_parameters": None},
        "multimodal RoPE is not supported",
    ),
    "a part of the head": ({"partial_rotary_factor": 0.5}, "but llama.cpp runs qwen3vl only if all are"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str, scaled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = WRONG[case]
    state = tiny_families.saved(scaled / "ck")
    values = json.loads((scaled / "ck" / "config.json").read_text())
    tiny_families.rewrite(tmp_path / "ck", state, values | {"text_config": values["text_config"] | changes})
    assert main(["convert", str(tmp_path / "ck"), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
