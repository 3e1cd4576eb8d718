"""The baked form runs exactly in programs that know nothing of us: llama.cpp by itself, and llama_cpp.Llama with its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from yarn_edge.bench.demo import YARN
from yarn_edge.bench.evidence.smollm2 import write_checkpoint
from yarn_edge.bench.peers.programs import F32, Logits, by_context, by_llama_class
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.flags import PlannerOptions
from yarn_edge.llama_rules.effective import FROM_MODEL
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import depth

HARDEST = {**YARN["rope_scaling"], "attention_factor": 1.35, "beta_fast": 8.0, "beta_slow": 2.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path], list[int]]:
    """(checkpoint, GGUF by form, tokens): yarn.md's hardest mix, baked and by arguments."""
    folder = tmp_path_factory.mktemp("baked")
    config = {**YARN, "rope_scaling": HARDEST}
    checkpoint = write_checkpoint(folder / "ck", dtype="F32", config=config, n_layers=depth.smol_layers())
    made = {
        "baked": convert(checkpoint, str(folder / "baked.gguf"), "F32")[0],
        "arguments": convert(checkpoint, str(folder / "arguments.gguf"), "F32", planner=PlannerOptions("never"))[0],
    }
    with Model(made["baked"], vocab_only=True) as model:
        tokens = model.tokenize(sample_text(), add_special=False, parse_special=False)[:512]
    return checkpoint, made, tokens


@pytest.fixture(scope="module")
def truth(files: tuple[Path, dict[str, Path], list[int]]) -> Logits:
    return reference_logits(files[0], files[2])


def test_the_same_file_in_other_programs(files: tuple[Path, dict[str, Path], list[int]], truth: Logits) -> None:
    _checkpoint, made, tokens = files
    ours = by_context(made["baked"], tokens, None)
    for theirs in (by_context(made["baked"], tokens, FROM_MODEL), by_llama_class(made["baked"], tokens, F32)):
        assert divergence(truth, theirs).kl_mean <= 1e-7
        assert divergence(ours, theirs).kl_mean <= 1e-7


def test_the_arguments_form_is_exact_here_and_not_there(
    files: tuple[Path, dict[str, Path], list[int]], truth: Logits
) -> None:
    """Why other programs are warned of: the betas stay behind."""
    _checkpoint, made, tokens = files
    assert divergence(truth, by_context(made["arguments"], tokens, None)).kl_mean <= 1e-7
    assert divergence(truth, by_llama_class(made["arguments"], tokens, F32)).kl_mean > 1e-4
