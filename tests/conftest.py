"""The real small model as checkpoints and GGUFs, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from yarn_edge.bench.demo import YARN
from yarn_edge.bench.evidence.smollm2 import write_checkpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.progress import set_quiet

from support import tiny


@pytest.fixture(autouse=True)
def no_quiet_left() -> Iterator[None]:
    """--quiet is for the rest of a process, but no test is to silence the next."""
    yield
    set_quiet(False)


@pytest.fixture(scope="session")
def smol_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M with YaRN factor 4, Llama, float32."""
    return write_checkpoint(tmp_path_factory.mktemp("smol") / "f32", dtype="F32", config=YARN)


@pytest.fixture(scope="session")
def smol_f32(smol_checkpoint: Path) -> Path:
    """The checkpoint as a float32 GGUF."""
    return convert(smol_checkpoint, str(smol_checkpoint.parent / "smol-F32.gguf"), "F32")[0]


@pytest.fixture(scope="session")
def smol_quants(smol_checkpoint: Path) -> dict[str, Path]:
    """The checkpoint as F16, Q8_0 and Q4_K_M."""
    names = ("F16", "Q8_0", "Q4_K_M")
    paths = convert(smol_checkpoint, str(smol_checkpoint.parent / "smol-{quant}.gguf"), ",".join(names))
    return dict(zip(names, paths, strict=True))


@pytest.fixture(scope="session")
def rich_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GGUF in which every key is there, the attention factor's own one too."""
    folder = tmp_path_factory.mktemp("rich")
    scaling = {**tiny.YARN["rope_scaling"], "attention_factor": 1.35}
    ck = tiny.write_checkpoint(folder / "ck", rope_scaling=scaling, hidden_size=256, head_dim=64)
    return convert(ck, str(folder / "rich.gguf"), "F32")[0]
