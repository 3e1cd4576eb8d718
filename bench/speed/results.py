"""What `yarn-edge bench` found: a row for each test of each configuration; as JSON with llama-bench's names for its own columns.

Our own columns are test, depth, n, tok_per_s, spread, seconds, status, and what proves that the numbers belong to the requested
configuration: where weights and cache are, the rope kernel, the ceiling.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from yarn_edge.runtime.kv_cache import kv_types
from yarn_edge.runtime.load_log import Buffer

from .configuration import FLASH, Configuration, buffer_places, device_bytes, name_of_test

OK = "ok"


@dataclass(frozen=True)
class LoadedModel:
    """What a child reported of its loaded model. model_type, model_size (bytes), model_n_params, n_gpu_layers: as llama-bench's."""

    load_s: float
    device: str
    flash_attention_used: bool | None
    attention_used: str
    offloaded: list[int] | None
    buffers: list[Buffer]
    model_type: str
    model_size: int
    model_n_params: int
    n_gpu_layers: int

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> LoadedModel:
        """From the child's event."""
        buffers = [(str(where), str(what), int(n_bytes)) for where, what, n_bytes in event["buffers"]]
        return cls(**{**event, "buffers": buffers})

    def as_json(self) -> dict[str, Any]:
        """Columns of a row. device_memory_bytes: by llama.cpp's own account; None on the CPU."""
        columns = {name: value for name, value in vars(self).items() if name != "buffers"}
        return columns | {
            "weights_on": buffer_places(self.buffers, "model"),
            "cache_on": buffer_places(self.buffers, "KV", "RS"),
            "device_memory_bytes": device_bytes(self.buffers, self.device) if self.n_gpu_layers else None,
        }


@dataclass(frozen=True)
class RopeCheck:
    """The rope kernel of the backend against the float64 reference, as in verify. status: pass, fail or skip."""

    status: str
    value: float | None
    limit: float | None
    detail: str


@dataclass(frozen=True)
class TimedRuns:
    """The timed runs of one test. n: tokens of a run; peak_rss_bytes: of the child so far."""

    n: int
    samples_ns: tuple[int, ...]
    peak_rss_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Median of the runs."""
        return statistics.median(self.samples_ns) / 1e9

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.n * 1e9 / t for t in self.samples_ns]

    @property
    def tok_per_s(self) -> float:
        """Of the median run."""
        return self.n / self.seconds

    @property
    def stddev(self) -> float:
        """Of the speeds; 0 for a single run, as in llama-bench."""
        return _deviation(self.speeds)

    def as_json(self) -> dict[str, Any]:
        """Columns of a row: ours, and llama-bench's means."""
        return {
            "tok_per_s": self.tok_per_s,
            "spread": {"stddev": self.stddev, "min": min(self.speeds), "max": max(self.speeds)},
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "avg_ns": round(statistics.fmean(self.samples_ns)),
            "stddev_ns": round(_deviation([float(t) for t in self.samples_ns])),
            "avg_ts": statistics.fmean(self.speeds),
            "stddev_ts": self.stddev,
            "samples_ns": list(self.samples_ns),
            "samples_ts": self.speeds,
        }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass
class SpeedRow:
    """One test of one configuration; or a backend that is not available, without configuration and test, but with a remedy.

    build: the backends of this build of llama.cpp, as llama-bench names them. bytes_per_token: what must be read from memory to
    generate one token; ceiling_tok_per_s: what the memory's bandwidth allows.
    """

    model: str
    path: Path
    backend: str
    build: str
    configuration: Configuration | None = None
    test: str | None = None
    n: int = 0
    status: str = "not measured"
    remedy: str = ""
    loaded: LoadedModel | None = None
    rope: RopeCheck | None = None
    times: TimedRuns | None = None
    bytes_per_token: int | None = None
    ceiling_tok_per_s: float | None = None

    @property
    def depth(self) -> int:
        """Tokens in the cache before the test."""
        return self.configuration.depth if self.configuration else 0

    @property
    def fraction(self) -> float | None:
        """Speed as a fraction of the ceiling, None if one of them is not known."""
        return self.times.tok_per_s / self.ceiling_tok_per_s if self.times and self.ceiling_tok_per_s else None

    def name(self, with_depth: bool = True) -> str:
        """The test as llama-bench writes it; "-" for a backend that is not available."""
        return "-" if self.test is None else name_of_test(self.test, self.n, self.depth if with_depth else 0)

    def as_json(self) -> dict[str, Any]:
        """Every column, None where there is no value."""
        columns = dict.fromkeys(_COLUMNS) | {
            "model": self.model,
            "backend": self.backend,
            "backends": self.build,
            "model_filename": str(self.path),
            "status": self.status,
        }
        if self.configuration is not None:
            columns |= self._configured(self.configuration)
        if self.loaded is not None:
            columns |= self.loaded.as_json()
        if self.times is not None:
            columns |= self.times.as_json()
        return columns | ({"remedy": self.remedy} if self.remedy else {})

    def _configured(self, c: Configuration) -> dict[str, Any]:
        """n_prompt, n_gen and n_depth are llama-bench's description of the test."""
        reads = self.test in ("pp", "ttft")
        return {
            "n_batch": c.n_batch,
            "n_ubatch": c.n_ubatch,
            "n_threads": c.threads,
            "type_k": kv_types(c.kv_type)[0],
            "type_v": kv_types(c.kv_type)[1],
            "flash_attn": FLASH.get(c.attention, 1),
            "n_ctx": c.n_ctx or c.needed_ctx,
            "test": self.test,
            "depth": c.depth,
            "n": self.n,
            "n_prompt": self.n if reads else 0,
            "n_gen": 0 if reads else self.n,
            "n_depth": 0 if self.test == "ttft" else c.depth,
            "rope_check": None if self.rope is None else asdict(self.rope),
            "bytes_per_token": self.bytes_per_token,
            "ceiling_tok_per_s": self.ceiling_tok_per_s,
            "fraction": self.fraction,
        }


_COLUMNS = (
    "model", "backend", "build_commit", "backends", "model_filename", "model_type", "model_size", "model_n_params", "n_batch",
    "n_ubatch", "n_threads", "type_k", "type_v", "n_gpu_layers", "flash_attn", "n_ctx", "test", "depth", "n", "n_prompt", "n_gen",
    "n_depth", "status", "tok_per_s", "spread", "seconds", "peak_rss_bytes", "device", "device_memory_bytes", "weights_on",
    "cache_on", "offloaded", "flash_attention_used",
    "attention_used", "rope_check", "bytes_per_token", "ceiling_tok_per_s", "fraction", "load_s",
    "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
)  # fmt: skip


def empty_rows(configuration: Configuration, path: Path, build: str) -> dict[str, SpeedRow]:
    """A row for each test of a configuration, by the test's name, nothing measured yet."""
    c = configuration
    return {test: SpeedRow(c.model, path, c.backend, build, c, test, n) for test, n in c.tests}
