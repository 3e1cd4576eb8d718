"""The kinds of hostile inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support import tiny_gguf
from support.fuzz.caches import Caches
from support.fuzz.checkpoints import Checkpoints
from support.fuzz.headers import Configs, GGUFs
from support.fuzz.loads import Loads
from support.fuzz.mutations import gguf_seeds
from support.fuzz.prompts import Prompts
from support.fuzz.runner import Kind
from support.fuzz.terminals import Terminals
from support.fuzz.texts import Texts

# By name: how it is made in a scratch folder, and its part of the inputs.
KINDS: dict[str, tuple[Callable[[Path], Kind], float]] = {
    "headers": (lambda scratch: GGUFs(gguf_seeds(scratch), scratch), 0.35),
    "configs": (lambda _scratch: Configs(), 0.35),
    "states": (lambda scratch: Caches(tiny_gguf.write(scratch / "tiny.gguf", "llama"), scratch), 0.15),
    "checkpoints": (Checkpoints, 0.04),
    "loads": (lambda scratch: Loads(gguf_seeds(scratch), scratch), 0.02),
    "texts": (Texts, 0.01),
    "prompts": (Prompts, 0.01),
    "terminals": (lambda _scratch: Terminals(), 0.003),
}
