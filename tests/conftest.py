"""How the suite runs: its depth, its signals and cores, and the models that are made once for all of it (docs/testing.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from yarn_edge.flags import TRUST
from yarn_edge.progress import set_quiet

from support import depth, processes
from support.made_once import Shelf


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="every layer, every proof (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported that starts threads."""
    depth.full = config.getoption("--full")
    os.environ[TRUST] = "1"  # thousands of new files are loaded; tests/runtime/test_first_load.py unsets it
    processes.receive_signals()
    if "PYTEST_XDIST_WORKER" in os.environ:
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        processes.take_share_of_cores(number, int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))


@pytest.fixture(autouse=True)
def no_quiet_left() -> Iterator[None]:
    """--quiet is for the rest of a process, but no test is to silence the next."""
    yield
    set_quiet(False)


@pytest.fixture(scope="session", autouse=True)
def proofs() -> Iterator[None]:
    """Without --full `convert` proves each tokenizer once a process; test_vocab asks `prove` itself."""
    from yarn_edge.convert import conversion

    from support.proofs import proved_once

    with pytest.MonkeyPatch.context() as patch:
        if not depth.full:
            patch.setattr(conversion, "prove", proved_once(conversion.prove))
        yield


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """What is made once for all workers of a run."""
    base = tmp_path_factory.getbasetemp()
    return Shelf(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="session")
def smol_checkpoint(shelf: Shelf) -> Path:
    """SmolLM2-135M with YaRN factor 4, Llama, float32; cut to its first layers, but with --full."""
    from support import smol

    return smol.checkpoint(shelf, depth.smol_layers())


@pytest.fixture(scope="session")
def smol_f32(shelf: Shelf) -> Path:
    """The checkpoint as a float32 GGUF."""
    from support import smol

    return smol.f32(shelf, depth.smol_layers())


@pytest.fixture(scope="session")
def whole_smol_checkpoint(shelf: Shelf) -> Path:
    """smol_checkpoint with all of its layers."""
    from support import smol

    return smol.checkpoint(shelf, depth.ALL_LAYERS)


@pytest.fixture(scope="session")
def whole_smol_f32(shelf: Shelf) -> Path:
    """smol_f32 with all of its layers."""
    from support import smol

    return smol.f32(shelf, depth.ALL_LAYERS)


@pytest.fixture(scope="session")
def smol_quants(shelf: Shelf) -> dict[str, Path]:
    """The checkpoint as F16, Q8_0 and Q4_K_M."""
    from support import smol

    return smol.quants(shelf, depth.smol_layers())


@pytest.fixture(scope="session")
def whole_smol_quants(shelf: Shelf) -> dict[str, Path]:
    """smol_quants with all of its layers."""
    from support import smol

    return smol.quants(shelf, depth.ALL_LAYERS)


@pytest.fixture(scope="session")
def rich_file(shelf: Shelf) -> Path:
    """A small GGUF in which every key is there, the attention factor's own one too."""
    from yarn_edge.convert.hf_to_gguf import convert

    from support import tiny

    def make(folder: Path) -> None:
        scaling = {**tiny.YARN["rope_scaling"], "attention_factor": 1.35}
        ck = tiny.write_checkpoint(folder / "ck", rope_scaling=scaling, hidden_size=256, head_dim=64)
        convert(ck, str(folder / "rich.gguf"), "F32")

    return shelf.made_once("rich", make) / "rich.gguf"
