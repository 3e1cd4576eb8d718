"""Mutated GGUF headers and configs through everything that reads them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from yarn_edge.checkpoint.config_file import read_config
from yarn_edge.checkpoint.read import read_positions, read_scaling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions, ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.inspect.command import inspect_checkpoint, inspect_gguf
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.llama_rules.rescale import from_file

from support.fuzz.mutations import CONFIGS, mutate_bytes, mutate_json, mutate_value
from support.fuzz.runner import Case

APPROXIMATE = PlannerOptions(allow_approximate=True)


def _each(steps: Sequence[Callable[[], object]]) -> None:
    """Every step; the last refusal is raised when none got through."""
    refusal: YarnEdgeError | None = None
    through = 0
    for step in steps:
        try:
            step()
            through += 1
        except YarnEdgeError as error:
            refusal = error
    if refusal is not None and not through:
        raise refusal


def read_gguf_everywhere(path: Path) -> None:
    """What `inspect`, `patch` and the loader do with a header."""
    file = read_gguf(path)
    positions = FilePositions(file)
    _each(
        [
            lambda: json.dumps(inspect_gguf(positions).as_json()["findings"]),
            lambda: plan_rope(from_file(positions), file.architecture, APPROXIMATE),
            lambda: plan_rope(
                from_file(positions, ScalingOverrides(4.0, 256)), file.architecture, PlannerOptions("always")
            ),
            lambda: positions.explicit_arguments,
        ]
    )


def read_config_everywhere(folder: Path) -> None:
    """What `inspect`, `convert` and `verify` do with a config."""
    config = read_config(folder)
    _each(
        [
            lambda: json.dumps(inspect_checkpoint(folder).as_json()["findings"]),
            lambda: read_positions(config, ScalingOverrides(freeze_at=65536)),
            lambda: read_positions(config, ScalingOverrides(4.0, 4096)),
            lambda: plan_rope(read_scaling(config), "llama", APPROXIMATE),
            lambda: plan_rope(read_scaling(config), "qwen2", APPROXIMATE),
        ]
    )


class GGUFs:
    """GGUFs of three forms and three architectures, through `inspect`, the planning of `patch` and the loader's arguments."""

    name, in_process = "GGUF headers", True

    def __init__(self, seeds: Sequence[bytes], scratch: Path) -> None:
        self.seeds = seeds
        self.headers = []
        for data in seeds:
            (scratch / "seed.gguf").write_bytes(data)
            self.headers.append(read_gguf(scratch / "seed.gguf"))

    def write(self, rng: random.Random, scratch: Path) -> Path:
        """A mutated file."""
        which = rng.randrange(len(self.seeds))
        path, header = scratch / "input.gguf", self.headers[which]
        if rng.random() < 0.6:
            path.write_bytes(mutate_value(rng, self.seeds[which], header))
        else:
            path.write_bytes(mutate_bytes(rng, self.seeds[which], header.data_offset))
        return path

    def case(self, rng: random.Random, scratch: Path) -> Case:
        path = self.write(rng, scratch)
        return Case(path.stat().st_size, lambda: read_gguf_everywhere(path))


class Configs:
    """Configs of every dialect, through `inspect` and the planning of `convert` for two architectures."""

    name, in_process = "configs", True

    def case(self, rng: random.Random, scratch: Path) -> Case:
        values = mutate_json(rng, rng.choice(CONFIGS))
        data = json.dumps(values).encode()
        if rng.random() < 0.1:
            data = mutate_bytes(rng, data, len(data))
        name, other = ("config.json", "params.json") if "yarn" not in values else ("params.json", "config.json")
        (scratch / other).unlink(missing_ok=True)
        (scratch / name).write_bytes(data)
        return Case(len(data), lambda: read_config_everywhere(scratch))
