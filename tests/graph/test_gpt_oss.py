"""gpt-oss as published (truncate false): exact in the live graph, and what plain llama.cpp makes of the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from yarn_edge.graph.opening import open_context
from yarn_edge.llama_rules.effective import FROM_MODEL
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.command import verify
from yarn_edge.verify.transformers_reference import Divergence, divergence

from support import gpt_oss

N_TOKENS = 320
TOKENS = [(7 * i * i + 3 * i + 11) % 260 for i in range(N_TOKENS)]


def divergences(folder: Path) -> tuple[Divergence, Divergence]:
    """(with the ropes edited, as llama.cpp runs the file), from transformers in float32."""
    made = gpt_oss.model()
    with torch.inference_mode():
        truth = made(torch.tensor([TOKENS])).logits[0].numpy()
    path, found = gpt_oss.write(folder / "gpt-oss.gguf", made), []
    for arguments in (None, FROM_MODEL):
        settings = ContextSettings(512, 512, kv_type="f32", arguments=arguments, attention="plain")
        with Model(path) as model, open_context(model, settings) as context:
            context.evaluate(TOKENS, 0, "all")
            found.append(divergence(np.asarray(truth), context.logits()))
    return found[0], found[1]


def test_as_published(tmp_path: Path) -> None:
    exact, plain = divergences(tmp_path)
    assert exact.kl_mean <= 1e-7
    assert exact.top1 == 1
    assert plain.kl_mean > 1e-3
    checks = {check.name: check.status for check in verify(tmp_path / "gpt-oss.gguf", threads=1)}
    assert [checks[name] for name in ("metadata", "kernel", "live-graph")] == ["pass"] * 3


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, result in zip(("edited", "plain"), divergences(Path(folder)), strict=True):
            sys.stdout.write(f"{name}: {result}\n")
