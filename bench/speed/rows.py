"""What `yarn-edge bench` measures, and what it tells of it: configurations, and a row for each test of each.

Rows have llama-bench's names for its own columns; ours are test, depth, n, tok_per_s, spread, seconds, status and what proves that
the numbers are of what was asked for: where weights and cache lie, the rope kernel, the ceiling.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from yarn_edge.runtime.context_settings import FlashAttention
from yarn_edge.runtime.load_log import Buffer

FLASH = {"auto": -1, "off": 0, "on": 1}  # llama.h: enum llama_flash_attn_type, as llama-bench prints it
CMAKE_FLAGS = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}
_ON_CPU = ("CPU", "AMX")  # what ggml's CPU backend names its buffers, such as CPU_REPACK
GENERATED_COST = 6.0  # about so many times as long as to read it takes to generate a token: for the progress bar

Row = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """One child's work. model: as in `variants`; n_ctx: None for what the tests need; samples: timed runs of each test."""

    model: str
    backend: str
    kv_type: str
    flash_attention: FlashAttention
    n_batch: int
    n_ubatch: int
    threads: int
    depth: int
    n_prompt: int = 512
    n_gen: int = 128
    samples: int = 5
    n_ctx: int | None = None

    @property
    def needed_ctx(self) -> int:
        """Tokens that the cache must hold."""
        return self.depth + max(self.n_prompt, self.n_gen, 1)

    @property
    def tests(self) -> list[tuple[str, int]]:
        """(name, tokens) of every test."""
        found = [("pp", self.n_prompt)] if self.n_prompt else []
        found += [("tg", self.n_gen), ("tg+s", self.n_gen)] if self.n_gen else []
        return found + ([("ttft", self.depth)] if self.depth else [])

    @property
    def cost(self) -> float:
        """Work for the progress bar, in tokens that are read."""
        return self.depth + self.n_prompt * (self.samples + 1) + 2 * GENERATED_COST * self.n_gen * self.samples

    def request(self) -> dict[str, Any]:
        """The fields of `speed_child.Request`."""
        return vars(self) | {"n_ctx": self.n_ctx or self.needed_ctx}

    def name(self) -> str:
        """For progress and notes."""
        return f"{self.backend} {self.kv_type} d{self.depth} t{self.threads}"


def product_of(
    model: str,
    *,
    backends: Sequence[str],
    kv_types: Sequence[str],
    flash: Sequence[FlashAttention],
    batches: Sequence[int],
    ubatches: Sequence[int],
    threads: Sequence[int],
    depths: Sequence[int],
    **same: Any,
) -> Iterator[Configuration]:
    """Every combination, each once; a micro-batch is at most a batch. `same`: what all share."""
    seen = set()
    for backend, kv, attention, batch, ubatch, n, depth in product(
        backends, kv_types, flash, batches, ubatches, threads, depths
    ):
        found = Configuration(model, backend, kv, attention, batch, min(batch, ubatch), n, depth, **same)
        if found not in seen:
            seen.add(found)
            yield found


def name_of(row: Mapping[str, Any]) -> str:
    """As llama-bench writes it: pp512, tg128 @ d4096; tg128+s is generation with sampling."""
    if row["test"] is None:
        return "-"
    base, plus, rest = str(row["test"]).partition("+")
    name = base if base == "ttft" else f"{base}{row['n']}{plus}{rest}"
    return f"{name} @ d{row['depth']}" if row["depth"] else name


def configured(configuration: Configuration, path: str, backends: str) -> Row:
    """The columns that are known before anything ran. backends: of this build, as llama-bench tells them."""
    c = configuration
    return {
        "model": c.model,
        "backend": c.backend,
        "build_commit": None,
        "backends": backends,
        "model_filename": path,
        "model_type": None,
        "model_size": None,
        "model_n_params": None,
        "n_batch": c.n_batch,
        "n_ubatch": c.n_ubatch,
        "n_threads": c.threads,
        "type_k": c.kv_type,
        "type_v": c.kv_type,
        "n_gpu_layers": None,
        "flash_attn": FLASH[c.flash_attention],
        "n_ctx": c.n_ctx or c.needed_ctx,
    }


# What a row has beside those, empty until it is measured. n_prompt, n_gen and n_depth: llama-bench's words for the test.
_EMPTY = (
    "test", "depth", "n", "n_prompt", "n_gen", "n_depth", "status", "tok_per_s", "spread", "seconds", "peak_rss_bytes", "device",
    "device_memory_bytes", "weights_on", "cache_on", "offloaded", "flash_attention_used", "rope_check", "bytes_per_token",
    "ceiling_tok_per_s", "fraction", "load_s", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
)  # fmt: skip


def empty_row(row: Mapping[str, Any], test: str, n: int, depth: int) -> Row:
    """A row of a test, without its result."""
    reads = test in ("pp", "ttft")
    return (
        dict(row)
        | dict.fromkeys(_EMPTY)
        | {
            "test": test,
            "depth": depth,
            "n": n,
            "n_prompt": n if reads else 0,
            "n_gen": 0 if reads else n,
            "n_depth": 0 if test == "ttft" else depth,
            "status": "not measured",
        }
    )


def absent(model: str, path: str, backend: str, backends: str, status: str, remedy: str) -> Row:
    """The row of a backend that is not there: there is no test of it."""
    nothing = dict.fromkeys(
        (*configured(Configuration(model, backend, "", "auto", 0, 0, 0, 0), path, backends), *_EMPTY)
    )
    told = {"model": model, "model_filename": path, "backend": backend, "backends": backends}
    return nothing | told | {"status": status, "remedy": remedy}


def measured(row: Mapping[str, Any], samples_ns: Sequence[int]) -> Row:
    """The row with its result: the median, its spread, and llama-bench's means."""
    speeds = [row["n"] * 1e9 / t for t in samples_ns]
    median = statistics.median(samples_ns) / 1e9

    def deviation(values: Sequence[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else 0.0

    return dict(row) | {
        "status": "ok",
        "tok_per_s": row["n"] / median,
        "seconds": median,
        "spread": {"stddev": deviation(speeds), "min": min(speeds), "max": max(speeds)},
        "avg_ns": round(statistics.fmean(samples_ns)),
        "stddev_ns": round(deviation([float(t) for t in samples_ns])),
        "avg_ts": statistics.fmean(speeds),
        "stddev_ts": deviation(speeds),
        "samples_ns": list(samples_ns),
        "samples_ts": speeds,
    }


def how_to_build(backend: str, version: str) -> str:
    """The command that builds llama-cpp-python with this backend."""
    return (
        f'CMAKE_ARGS="{CMAKE_FLAGS[backend]}" pip install --no-binary llama-cpp-python --force-reinstall --no-cache-dir '
        f"llama-cpp-python=={version}"
    )


def buffer_places(buffers: Sequence[Buffer], *kinds: str) -> str:
    """Where the buffers of these kinds lie, with their size."""
    sizes: dict[str, int] = {}
    for where, what, n_bytes in buffers:
        if what in kinds:
            sizes[where] = sizes.get(where, 0) + n_bytes
    return ", ".join(f"{where} {n_bytes / 2**20:.0f} MiB" for where, n_bytes in sizes.items())


def device_bytes(buffers: Sequence[Buffer], device: str) -> int:
    """What lies in the memory of a device, by llama.cpp's own account."""
    return sum(n_bytes for where, _what, n_bytes in buffers if where.startswith(device))


def misplaced(buffers: Sequence[Buffer], device: str | None, offloaded: Sequence[int] | None) -> str | None:
    """What is elsewhere than asked for (device None: the CPU), as the reason of a failure; None where all is in place.

    On a GPU the embeddings stay with the CPU, which looks them up: that is llama.cpp's way, and no layer.
    """
    own = _ON_CPU if device is None else (device,)
    caches = {where for where, what, _ in buffers if what in ("KV", "RS")}
    strangers = sorted(where for where in caches if not where.startswith(own))
    weights = {where for where, what, _ in buffers if what == "model"}
    if not weights or not caches:
        return "llama.cpp's log does not tell where weights and cache lie"
    if device is None:
        strangers += sorted(w for w in weights if not w.startswith(own) and not w.endswith("_Host"))
    elif offloaded is None or offloaded[0] != offloaded[1]:
        count = "no" if offloaded is None else f"{offloaded[0]} of {offloaded[1]}"
        return f"{count} layers are on {device}"
    elif not any(where.startswith(own) for where in weights):
        strangers += sorted(weights)
    return f"weights or cache are in {', '.join(strangers)}, not on {device or 'CPU'}" if strangers else None
