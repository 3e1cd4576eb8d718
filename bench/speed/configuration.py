"""What `yarn-edge bench` measures: configurations and their tests, and whether weights and cache are where they should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from yarn_edge.runtime import ggml
from yarn_edge.runtime.context_settings import Attention
from yarn_edge.runtime.layer_split import LayerSplit
from yarn_edge.runtime.load_log import Buffer

FLASH = {"ggml": -1, "plain": 0, "flash": 1}  # llama.h: enum llama_flash_attn_type, as llama-bench prints it
CMAKE_FLAGS = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}
_ON_CPU = ("CPU", "AMX")  # what ggml's CPU backend names its buffers, such as CPU_REPACK
GENERATED_COST = 6.0  # about how much longer than reading a token it takes to generate one: for the progress bar


@dataclass(frozen=True)
class Configuration:
    """The work of one child process. model: as in `variants`; n_ctx: None for what the tests need; samples: timed runs per test."""

    model: str
    backend: str
    kv_type: str
    attention: Attention
    n_batch: int
    n_ubatch: int
    threads: int
    depth: int
    n_prompt: int = 512
    n_gen: int = 128
    samples: int = 5
    n_ctx: int | None = None
    split: tuple[Sequence[str], str, bool] | None = None

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
        """Work for the progress bar, in tokens read."""
        return self.depth + self.n_prompt * (self.samples + 1) + 2 * GENERATED_COST * self.n_gen * self.samples

    def request(self) -> dict[str, Any]:
        """The fields of `child.Request`."""
        return vars(self) | {"n_ctx": self.n_ctx or self.needed_ctx}

    def name(self) -> str:
        """For the progress bar and notes."""
        return f"{self.backend} {self.kv_type} d{self.depth} t{self.threads}"


def product_of(
    model: str,
    *,
    backends: Sequence[str],
    kv_types: Sequence[str],
    attention: Sequence[Attention],
    batches: Sequence[int],
    ubatches: Sequence[int],
    threads: Sequence[int],
    depths: Sequence[int],
    **same: Any,
) -> Iterator[Configuration]:
    """Every combination, each once; a micro-batch is at most a batch. `same`: what all configurations share."""
    seen = set()
    for backend, kv, kind, batch, ubatch, n, depth in product(
        backends, kv_types, attention, batches, ubatches, threads, depths
    ):
        one = Configuration(model, backend, kv, kind, batch, min(batch, ubatch), n, depth, **same)
        if one not in seen:
            seen.add(one)
            yield one


def name_of_test(test: str, n: int, depth: int) -> str:
    """As llama-bench writes it: pp512, tg128 @ d4096; tg128+s is generation with sampling."""
    base, plus, rest = test.partition("+")
    name = base if base == "ttft" else f"{base}{n}{plus}{rest}"
    return f"{name} @ d{depth}" if depth else name


def how_to_build(backend: str, version: str) -> str:
    """The command that builds llama-cpp-python with this backend."""
    return (
        f'CMAKE_ARGS="{CMAKE_FLAGS[backend]}" pip install --no-binary llama-cpp-python --force-reinstall --no-cache-dir '
        f"llama-cpp-python=={version}"
    )


def buffer_places(buffers: Sequence[Buffer], *kinds: str) -> str:
    """Where the buffers of these kinds are, with their sizes."""
    sizes: dict[str, int] = {}
    for where, what, n_bytes in buffers:
        if what in kinds:
            sizes[where] = sizes.get(where, 0) + n_bytes
    return ", ".join(f"{where} {n_bytes / 2**20:.0f} MiB" for where, n_bytes in sizes.items())


def device_bytes(buffers: Sequence[Buffer], device: str) -> int:
    """Bytes in the memory of a device, by llama.cpp's own account; in that of all devices of a split."""
    if "=" in device:
        return sum(n_bytes for where, _what, n_bytes in buffers if not where.startswith(_ON_CPU))
    return sum(n_bytes for where, _what, n_bytes in buffers if where.startswith(device))


def misplaced(buffers: Sequence[Buffer], device: str | None, offloaded: Sequence[int] | None) -> str | None:
    """What is not on the requested device (None: the CPU), as the reason for a failure; None if everything is in place.

    With a GPU the embeddings stay on the CPU, which looks them up: llama.cpp does not count them as a layer.
    """
    own = _ON_CPU if device is None else (device,)
    caches = {where for where, what, _ in buffers if what in ("KV", "RS")}
    elsewhere = sorted(where for where in caches if not where.startswith(own))
    weights = {where for where, what, _ in buffers if what == "model"}
    if not weights or not caches:
        return "llama.cpp's log does not say where weights and cache are"
    if device is None:
        elsewhere += sorted(w for w in weights if not w.startswith(own) and not w.endswith("_Host"))
    elif offloaded is None or offloaded[0] != offloaded[1]:
        count = "no" if offloaded is None else f"{offloaded[0]} of {offloaded[1]}"
        return f"{count} layers are on {device}"
    elif not any(where.startswith(own) for where in weights):
        elsewhere += sorted(weights)
    return f"weights or cache are in {', '.join(elsewhere)}, not on {device or 'CPU'}" if elsewhere else None


def misplaced_split(buffers: Sequence[Buffer], split: LayerSplit) -> str | None:
    """The device of a split without weights or cache, as the reason for a failure."""
    for device in split.devices:
        own = _ON_CPU if device.kind == "cpu" else (ggml.memory_name(device),)
        for what, kinds in (("weights", ("model",)), ("cache", ("KV", "RS"))):
            if not any(where.startswith(own) for where, kind, _n in buffers if kind in kinds):
                return f"no {what} are on {device.name}, although layers of {split.name} are to be there"
    return None
