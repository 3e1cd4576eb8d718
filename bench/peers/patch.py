"""How long `yarn-edge patch` takes on a large file, next to `cp` of the same file.

`python -m yarn_edge.bench.peers.patch [--size 2GB] [--repeat 5] [--folder DIR]` makes a GGUF of random data. In turns it copies
that file with the system's cp and patches it, and does both again with the file on the disk at the end (`cp` and `sync FILE`,
`patch --sync`). Each side is whole processes: ours includes the start of Python, the check of the header and reading the result
back. The source is in the page cache for all, as far as memory reaches. What was made is removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import memory_size
from yarn_edge.gguf.header import TensorSpec, lay_out, pack_key
from yarn_edge.progress import bar
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.writer import check_space

from .race import Race, Results, add_folder_flag
from .turns import YARN_EDGE, Contender, command_line, run_turns, timing_table, timings

LIMIT = 1.2  # ours / cp
TENSORS = 32
_CHUNK_BYTES = 32 << 20
SCALING = {"yarn_factor": 4, "yarn_orig_ctx": 8192, "yarn_beta_fast": 8}


def write_random_gguf(path: Path, n_bytes: int) -> None:
    """A GGUF with about `n_bytes` of random half-precision tensors, and the keys of a vocabulary of 50000 tokens."""
    columns = max(1, n_bytes // TENSORS // 2 // 64)
    half = type_named("F16")
    specs = [TensorSpec(f"blk.{i}.weight", (columns, 64), half.number, columns * 128) for i in range(TENSORS)]
    sizes = {"context_length": 8192, "embedding_length": 2048, "block_count": 22}
    heads = {"head_count": 32, "head_count_kv": 4, "layer_norm_rms_epsilon": 1e-5}
    keys: dict[str, Any] = {"general.architecture": "llama"}
    keys |= {f"llama.{name}": value for name, value in sizes.items()}
    keys |= {f"llama.attention.{name}": value for name, value in heads.items()}
    keys["tokenizer.ggml.tokens"] = [f"token {i}" for i in range(50_000)]
    layout = lay_out([pack_key(key, value) for key, value in keys.items()], specs)
    rng = np.random.default_rng(0)
    with path.open("wb") as file, bar("Writing the source", layout.file_bytes, "bytes") as advance:
        file.write(layout.header)
        while left := layout.file_bytes - file.tell():
            advance(file.write(rng.bytes(min(left, _CHUNK_BYTES))))


def copying_sides(source: Path, output: Path) -> dict[str, Contender]:
    """cp and patch, without and with the file on the disk at the end."""

    def prepare() -> None:
        output.unlink(missing_ok=True)
        os.sync()  # the disk is at rest

    copy, synced = ["cp", str(source), str(output)], ["sync", str(output)]
    patches = [
        command_line(YARN_EDGE, "patch", source, o=output, quiet=True, sync=sync, **SCALING) for sync in (False, True)
    ]
    lines = {"cp": [copy], "patch": patches[:1], "cp, sync": [copy, synced], "patch --sync": patches[1:]}
    return {name: Contender(commands, prepare) for name, commands in lines.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add = parser.add_argument
    add("--size", type=memory_size, default=2 * 10**9, metavar="SIZE", help="size of the file (default: 2GB)")
    add_folder_flag(parser)


def run(args: argparse.Namespace, results: Results) -> None:
    """All sides in turns after a warm-up."""
    if not args.folder.is_dir():
        raise YarnEdgeError(f"{args.folder}: no such folder")
    if shutil.which("cp") is None or shutil.which("sync") is None:
        raise YarnEdgeError("this machine has no cp and sync to compare with")
    check_space(args.folder, 2 * args.size + args.size // 10, "a source and a copy")
    with tempfile.TemporaryDirectory(prefix="patch-race-", dir=args.folder) as inside:
        source = Path(inside, "source.gguf")
        write_random_gguf(source, args.size)
        turns = run_turns("Copying", copying_sides(source, Path(inside, "output.gguf")), args.repeat, warm_up=True)
        results |= {"file_bytes": source.stat().st_size, "folder": str(args.folder), "repeat": args.repeat}
    results |= {**timings(turns), "limit": LIMIT}
    medians = results["median_s"]
    results["ratio"] = medians["patch"] / medians["cp"]
    results["ratio_with_sync"] = medians["patch --sync"] / medians["cp, sync"]


def _tables(results: Results) -> str:
    rates = {side: f"{results['file_bytes'] / seconds / 1e6:.0f}" for side, seconds in results["median_s"].items()}
    return timing_table(results, {"MB/s": rates}) + (
        f"\npatch / cp: {results['ratio']:.2f} of medians (limit {LIMIT}); with sync on both sides: "
        f"{results['ratio_with_sync']:.2f}; {results['file_bytes'] / 1e9:.2f} GB in {results['folder']}\n"
    )


def _passed(results: Results) -> bool:
    return bool(results["ratio"] <= LIMIT)


WHAT = "Time of patch on a large GGUF, next to cp."
RACE = Race("patch", WHAT, add_arguments, run, _tables, _passed, repeat=5, threads=False)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
