"""Phi-3's LongRoPE: both tables in the file, of which llama.cpp and transformers choose one, and one of them frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.patch import patch
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import NO_OVERRIDES, PlannerOptions, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify import command
from yarn_edge.verify.checks import CHECKPOINT, check_live_graph, check_metadata
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import tiny_families
from support.made_once import Shelf

ORIGIN, LONGEST = 256, 1024
SHORT, LONG = [1 + i / 8 for i in range(8)], [1.5 + 0.75 * i for i in range(8)]
LONGROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT, "long_factor": LONG},
    "original_max_position_embeddings": ORIGIN,
    "max_position_embeddings": LONGEST,
}
TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(400)]
TABLES = ["rope_factors_long.weight", "rope_factors_short.weight"]


@pytest.fixture(scope="module")
def folder(shelf: Shelf) -> Path:
    return shelf.made_once("phi3-longrope", lambda room: tiny_families.write(room / "ck", "phi3", **LONGROPE)) / "ck"


@pytest.fixture(scope="module")
def as_it_is(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(folder, str(tmp_path_factory.mktemp("longrope") / "out.gguf"), "F32")[0]


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[int, np.ndarray[Any, Any]]:
    return {n: reference_logits(folder, TOKENS[:n]) for n in (ORIGIN, 400)}


def logits_of(path: Path, n_tokens: int, n_ctx: int) -> np.ndarray[Any, Any]:
    settings = ContextSettings(n_ctx, n_tokens, kv_type="f32", attention="plain")
    with Model(path) as model, open_context(model, settings) as context:
        context.evaluate(TOKENS[:n_tokens], 0, "all")
        return context.logits()


@pytest.mark.parametrize("n_tokens, n_ctx", [(ORIGIN, ORIGIN), (400, 512)], ids=["up to the original", "beyond it"])
def test_as_it_is(as_it_is: Path, truth: dict[int, Any], n_tokens: int, n_ctx: int) -> None:
    assert divergence(truth[n_tokens], logits_of(as_it_is, n_tokens, n_ctx)).kl_mean < 1e-7


def test_the_size_of_the_context_decides_even_for_short_texts(as_it_is: Path, truth: dict[int, Any]) -> None:
    assert divergence(truth[ORIGIN], logits_of(as_it_is, ORIGIN, 512)).kl_mean > 1e-2


def test_the_file_is_that_of_upstreams_converter(as_it_is: Path) -> None:
    """conversion/phi.py: both tables in float32, A, the original context."""
    file = read_gguf(as_it_is)
    for name, table in zip(TABLES, (LONG, SHORT), strict=True):
        np.testing.assert_array_equal(file.float32_tensor(name, 8), np.float32(table))
    assert file.metadata["phi3.rope.scaling.attn_factor"] == np.float32(np.sqrt(1 + np.log(4) / np.log(ORIGIN)))
    assert file.metadata["phi3.rope.scaling.original_context_length"] == ORIGIN
    assert file.metadata["phi3.context_length"] == LONGEST


@pytest.mark.parametrize("length, n_tokens, n_ctx, context", [(200, ORIGIN, 512, ORIGIN), (300, 400, 512, LONGEST)])
def test_frozen(
    length: int, n_tokens: int, n_ctx: int, context: int, folder: Path, truth: dict[int, Any], tmp_path: Path
) -> None:
    """One table for every context, in the file twice, so that every llama.cpp program runs it."""
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=ScalingOverrides(freeze_at=length))[0]
    file = read_gguf(path)
    assert file.metadata["phi3.context_length"] == context
    assert divergence(truth[n_tokens], logits_of(path, n_tokens, n_ctx)).kl_mean < 1e-7
    positions = FilePositions(file)
    assert positions.error().any_difference is False
    assert positions.llama_class_arguments == {}


def test_own_betas_are_portable_too(tmp_path: Path) -> None:
    """What keys alone cannot carry is baked into the two tables."""
    folder = tiny_families.write(tmp_path / "ck", "phi3", max_position_embeddings=ORIGIN)
    flags = ScalingOverrides(factor=4.0, original_context=ORIGIN, beta_fast=8.0)
    planner = PlannerOptions(positions="portable")
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=flags, planner=planner)[0]
    assert {*TABLES} <= read_gguf(path).tensors.keys()
    assert FilePositions(read_gguf(path)).llama_class_arguments == {}


def test_where_no_length_decides(as_it_is: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(YarnEdgeError, match="whose frequencies depend on the requested context"):
        _ = FilePositions(read_gguf(as_it_is)).runs
    with pytest.raises(YarnEdgeError, match=r"positions differ by allocated context .* pass --freeze-at N"):
        convert(folder, str(tmp_path / "no.gguf"), "F32", planner=PlannerOptions("never"))
    with pytest.raises(YarnEdgeError, match=r"--freeze-at 2000 is above .* 1024"):
        convert(folder, str(tmp_path / "no.gguf"), "F32", overrides=ScalingOverrides(freeze_at=2000))


@pytest.mark.parametrize("own", [True, False], ids=["its checkpoint", "the tables swapped"])
def test_verify_judges_both_tables(own: bool, as_it_is: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = folder
    if not own:
        checkpoint = tmp_path
        values = json.loads((folder / "config.json").read_text())
        values["rope_parameters"] |= {"short_factor": LONG, "long_factor": SHORT}
        (tmp_path / "config.json").write_text(json.dumps(values))
    goals, replaced = command._goals(read_gguf(as_it_is), checkpoint, NO_OVERRIDES)
    assert replaced is None
    assert [goal.positions.n_ctx for goal in goals] == [ORIGIN, LONGEST]
    wanted = "pass" if own else "fail"
    assert [check_metadata(goal.positions, goal.full, CHECKPOINT).status for goal in goals] == [wanted] * 2
    with Model(as_it_is) as model:
        live = [check_live_graph(model, goal.full, n_ctx=goal.positions.n_ctx).status for goal in goals]
    assert live == [wanted] * 2


def test_inspect_finds_nothing(as_it_is: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (as_it_is, folder):
        assert main(["inspect", str(model), "--json"]) == 0
        told = capsys.readouterr()
        assert json.loads(told.out)["findings"] == []
        assert ("shorter ones run rope_factors_short.weight" in told.err) == (model == as_it_is)


def test_patch_takes_one_table_and_says_so_of_two(as_it_is: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(YarnEdgeError, match=r"config.json: LongRoPE has two tables.* pass --freeze-at N"):
        patch(as_it_is, out, checkpoint=folder)
    assert not out.exists()
    patch(as_it_is, out, checkpoint=folder, overrides=ScalingOverrides(freeze_at=LONGEST))
    assert {tuple(read_gguf(out).float32_tensor(name, 8)) for name in TABLES} == {tuple(np.float32(LONG))}
