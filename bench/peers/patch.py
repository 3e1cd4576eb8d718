"""How long `yarn-edge patch` takes on a large file, next to `cp` of the same file.

`python -m yarn_edge.bench.peers.patch [--size 2GB] [--repeat 5] [--folder DIR]` makes a GGUF of random data and, in turns,
copies it with the system's cp and patches it; and both with the file on the disk at the end (`cp` and `sync FILE`, `patch
--sync`). Each side is whole processes from start to end, ours with the start of Python, the check of the header and reading the
outcome back. The source is in the page cache for all, as far as memory reaches. What was made is removed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.header import TensorSpec, lay_out, pack_key
from yarn_edge.progress import bar, note
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.writer import check_space

LIMIT = 1.2  # ours / cp
TENSORS = 32
_CHUNK_BYTES = 32 << 20
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
PATCH = [
    sys.executable, "-m", "yarn_edge", "patch", "--quiet", "--yarn-factor", "4", "--yarn-orig-ctx", "8192", "--yarn-beta-fast", "8",
]  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "2GB", "512MiB", "1000"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) * _UNITS[match[2]] < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 2GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def write_random_gguf(path: Path, n_bytes: int) -> None:
    """A GGUF with about `n_bytes` of random half-precision tensors, and the keys of a vocabulary of 50000 tokens."""
    columns = max(1, n_bytes // TENSORS // 2 // 64)
    half = type_named("F16")
    specs = [TensorSpec(f"blk.{i}.weight", (columns, 64), half.number, columns * 128) for i in range(TENSORS)]
    sizes: dict[str, Any] = {
        "context_length": 8192,
        "embedding_length": 2048,
        "block_count": 22,
        "attention.head_count": 32,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        **{f"llama.{name}": value for name, value in sizes.items()},
    }
    keys["tokenizer.ggml.tokens"] = [f"token {i}" for i in range(50_000)]
    layout = lay_out([pack_key(key, value) for key, value in keys.items()], specs)
    rng = np.random.default_rng(0)
    with path.open("wb") as file, bar("Writing the source", layout.file_bytes, "bytes") as advance:
        file.write(layout.header)
        while left := layout.file_bytes - file.tell():
            advance(file.write(rng.bytes(min(left, _CHUNK_BYTES))))


def _timed(commands: list[list[str]], output: Path) -> float:
    """Seconds of the commands one after the other; the output is removed, and the disk at rest before and after."""
    os.sync()
    start = time.perf_counter()
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise YarnEdgeError(f"{' '.join(command[:2])}: failed: {(done.stderr.splitlines() or ['?'])[-1]}")
    took = time.perf_counter() - start
    output.unlink()
    os.sync()
    return took


def measure(n_bytes: int, repeat: int, folder: Path) -> dict[str, Any]:
    """Seconds of each side, one warm-up turn not counted, who goes first in turns; medians and ratios."""
    if shutil.which("cp") is None or shutil.which("sync") is None:
        raise YarnEdgeError("this machine has no cp and sync to compare with")
    check_space(folder, 2 * n_bytes + n_bytes // 10, "a source and a copy")
    with tempfile.TemporaryDirectory(prefix="patch-speed-", dir=folder) as inside:
        source, output = Path(inside, "source.gguf"), Path(inside, "output.gguf")
        write_random_gguf(source, n_bytes)
        sides = {
            "cp": [["cp", str(source), str(output)]],
            "patch": [[*PATCH, str(source), "-o", str(output)]],
            "cp, sync": [["cp", str(source), str(output)], ["sync", str(output)]],
            "patch --sync": [[*PATCH, "--sync", str(source), "-o", str(output)]],
        }
        times: dict[str, list[float]] = {side: [] for side in sides}
        with bar("Copying", len(sides) * (repeat + 1)) as advance:
            for turn in range(repeat + 1):
                for side in sorted(sides, reverse=bool(turn % 2)):
                    took = _timed(sides[side], output)
                    advance(1)
                    if turn:
                        times[side].append(took)
                        note(f"{side}: {took:.2f} s")
        size = source.stat().st_size
    medians = {side: statistics.median(values) for side, values in times.items()}
    return {
        "file_bytes": size,
        "folder": str(folder),
        "repeat": repeat,
        "seconds": times,
        "median_s": medians,
        "ratio": medians["patch"] / medians["cp"],
        "ratio_with_sync": medians["patch --sync"] / medians["cp, sync"],
        "limit": LIMIT,
    }


def main() -> int:
    """Print the table, or JSON. Returns 1 if patch takes more than 1.2 times cp."""
    parser = argparse.ArgumentParser(prog="patch_speed", description="Time of patch on a large GGUF, against cp.")
    parser.add_argument("--size", type=parse_size, default=parse_size("2GB"), metavar="SIZE", help="default: 2GB")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="pairs that count (default: 5)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    try:
        if args.repeat < 1 or not args.folder.is_dir():
            raise YarnEdgeError(f"{args.folder}: no such folder" if args.repeat > 0 else "--repeat is below 1")
        found = measure(args.size, args.repeat, args.folder)
    except YarnEdgeError as error:
        sys.stderr.write(f"patch_speed: error: {error}\n")
        return 2
    if args.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write("| side | median s | least | most | MB/s |\n|---|---|---|---|---|\n")
        for side, values in found["seconds"].items():
            median = found["median_s"][side]
            rate = found["file_bytes"] / median / 1e6
            sys.stdout.write(f"| {side} | {median:.2f} | {min(values):.2f} | {max(values):.2f} | {rate:.0f} |\n")
        sys.stdout.write(
            f"\npatch / cp: {found['ratio']:.2f} of medians (limit {LIMIT}); with sync on both sides: "
            f"{found['ratio_with_sync']:.2f}; {found['file_bytes'] / 1e9:.2f} GB in {found['folder']}\n"
        )
    return int(found["ratio"] > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
