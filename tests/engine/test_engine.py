"""An engine for chat and serve: what is said, another factor, the folder of states."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from yarn_edge.cache_folder import user_cache_folder
from yarn_edge.chat.command import add_arguments
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.engine.flags import engine_settings
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.sampling import Sampling
from yarn_edge.flags import PlannerOptions
from yarn_edge.memory.placement import Wanted

from support import tiny


@pytest.fixture(scope="module")
def yarn_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """YaRN, factor 4 from 256 tokens."""
    folder = tiny.write_checkpoint(tmp_path_factory.mktemp("yarn") / "ck")
    return convert(folder, str(folder.parent / "yarn.gguf"), "F32")[0]


FACTORS = {
    "own": (None, None, 4.0, "YaRN factor 4 from 256"),
    "another": (2.0, 512, 2.0, "YaRN factor 2 from 256"),
    "the smallest that holds it": (
        "auto",
        512,
        2.0,
        "auto: 2 holds 512 tokens (original context 256, the file's factor is 4)",
    ),
    "none is needed": ("auto", 256, 1.0, "no position scaling"),
    "all of it": ("auto", 1024, 4.0, "auto: 4 holds 1024"),
}


@pytest.mark.parametrize("factor, ctx, runs, told", FACTORS.values(), ids=FACTORS)
def test_factors(
    factor: float | None, ctx: int | None, runs: float, told: str, yarn_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(yarn_file, Wanted("cpu", ctx, threads=1), EngineSettings(yarn_factor=factor)) as one:  # type: ignore[arg-type]
        context = one.context
        scaling = context.model.positions.effective(context.arguments)
        assert scaling.factor == pytest.approx(runs)
        if runs > 1:
            assert scaling.attention_factor == pytest.approx(scaling.default_attention_factor)
        list(one.generate([5, 6, 7], Sampling(temperature=0), 2))
    err = capsys.readouterr().err
    assert told in err
    assert "warning" not in err


def test_a_context_beyond_the_factor_is_told(yarn_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with opened(yarn_file, Wanted("cpu", 1024, threads=1), EngineSettings(yarn_factor=2.0)):
        assert "exceeds the 512 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("ctx, holds", [(64, 256), (257, 512), (256, None), (1024, None), (None, None)])
def test_a_context_that_is_rounded_up_is_told(
    ctx: int | None, holds: int | None, yarn_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(yarn_file, Wanted("cpu", ctx, threads=1)) as one:
        assert ctx is None or one.context.n_ctx == (holds or ctx)
    told = f"--ctx {ctx}: llama.cpp rounds a context up to a multiple of 256 tokens, so it holds {holds}"
    err = capsys.readouterr().err
    assert (told in err) is (holds is not None)
    assert ("rounds" in err) is (holds is not None)


def test_a_file_that_holds_its_frequencies_runs_another_factor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "beta_fast": 8.0}
    folder = tiny.write_checkpoint(tmp_path / "ck", rope_scaling=scaling)
    path = convert(folder, str(tmp_path / "baked.gguf"), "F32", planner=PlannerOptions("always"))[0]
    engine = opened(path, Wanted("cpu", 512, threads=1), EngineSettings(yarn_factor=2.0))
    with engine as generation:
        live = generation.context.arguments.live
    assert live is not None
    assert live.full.attention_factor == pytest.approx(0.1 * math.log(2) + 1)
    assert "YaRN factor 2 from 256, attention factor 1.0693" in capsys.readouterr().err


def test_the_folder_of_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert user_cache_folder() == tmp_path / "yarn-edge"
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert engine_settings(parser.parse_args(["m.gguf"])) == EngineSettings()
    assert engine_settings(parser.parse_args(["m.gguf", "--cache"])).cache == tmp_path / "yarn-edge"
    asked = parser.parse_args(
        ["m.gguf", "--cache", "here", "--cache-size", "1GiB", "--lookup", "off", "--yarn-factor", "auto"]
    )
    assert engine_settings(asked) == EngineSettings(Path("here"), 2**30, "off", "auto")
