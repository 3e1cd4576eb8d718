"""How long a checkpoint takes to become quantized GGUFs, and in how much memory, next to llama.cpp's two programs.

`python -m yarn_edge.bench.peers.convert CHECKPOINT --peer LLAMA_CPP [--bin DIR] [--quant Q4_K_M] [--repeat 5]` runs in turns
`yarn-edge convert`, and `convert_hf_to_gguf.py` with one `llama-quantize` for each type; whole processes from start to end,
the checkpoint in the page cache for both as far as memory reaches. Tensor data is compared byte by byte. Without --peer
ours alone is measured, which is how a model runs that would not fit twice (`--shape 7B` of `random_checkpoint`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from yarn_edge.convert.kernels.choose import FAST, GGML
from yarn_edge.convert.quant_types import parse_quants
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.progress import bar, note
from yarn_edge.runtime.llama_api import physical_threads

_POLL_S = 0.02


@dataclass
class ConvertRun:
    """One process: seconds, the peaks of its resident and its anonymous memory in bytes (0 where /proc is not), its words."""

    seconds: float
    rss_bytes: int
    anonymous_bytes: int
    output: str = ""


@dataclass
class Side:
    """All runs of one side; each is a list of its processes."""

    runs: list[list[ConvertRun]] = field(default_factory=list)

    def median_s(self) -> float:
        """Seconds of all its processes, the median over the runs."""
        return statistics.median(sum(p.seconds for p in run) for run in self.runs)

    def peak(self, which: str) -> int:
        """The largest peak of any process, in bytes."""
        return max(int(getattr(process, which)) for run in self.runs for process in run)


def run_process(command: Sequence[str], allowed: Sequence[int] = (0,)) -> ConvertRun:
    """Run to the end, looking at its memory. Raises YarnEdgeError with its last words if it fails."""
    with tempfile.TemporaryFile() as told:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=told, stderr=subprocess.STDOUT)
        rss = anonymous = 0
        try:
            while process.poll() is None:
                now = _memory(process.pid)
                rss, anonymous = max(rss, now[0]), max(anonymous, now[1])
                time.sleep(_POLL_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        told.seek(0)
        output = told.read().decode(errors="replace")
        if process.returncode not in allowed:
            last = output.strip().splitlines()[-1:]
            raise YarnEdgeError(f"{Path(command[0]).name} … ended with {process.returncode}: {' '.join(last)}")
    return ConvertRun(seconds, rss, anonymous, output)


def _memory(pid: int) -> tuple[int, int]:
    """(resident, anonymous) bytes; the former is the kernel's own high-water mark."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    resident, anonymous = (int(values.get(key, "0 kB").split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
    return resident, anonymous


def ours(
    checkpoint: Path, quants: Sequence[str], threads: int, folder: Path, kernels: str | None = None
) -> list[list[str]]:
    """One process for all types. kernels: --kernels of convert."""
    output = str(folder / "ours-{quant}.gguf")
    return [
        [
            sys.executable,
            "-m",
            "yarn_edge",
            "convert",
            str(checkpoint),
            "-o",
            output,
            "--quant",
            ",".join(quants),
            "--threads",
            str(threads),
            "--quiet",
            *(["--kernels", kernels] if kernels else []),
        ]
    ]


def theirs(
    checkpoint: Path, quants: Sequence[str], threads: int, folder: Path, source: Path, binaries: Path
) -> list[list[str]]:
    """Upstream's converter to a 16-bit file, and its quantizer for each type."""
    between = str(folder / "between.gguf")
    convert = [
        sys.executable,
        str(source / "convert_hf_to_gguf.py"),
        str(checkpoint),
        "--outtype",
        "bf16",
        "--outfile",
        between,
    ]
    quantize = [
        [str(binaries / "llama-quantize"), between, str(folder / f"theirs-{quant}.gguf"), quant, str(threads)]
        for quant in quants
    ]
    return [convert, *quantize]


def same_data(a: Path, b: Path) -> bool:
    """Whether two GGUFs hold the same tensors with the same bytes."""
    one, other = read_gguf(a, vocabulary=False), read_gguf(b, vocabulary=False)
    if one.tensors.keys() != other.tensors.keys():
        return False
    with a.open("rb") as first, b.open("rb") as second:
        for name, info in one.tensors.items():
            twin = other.tensors[name]
            if (info.type_name, info.shape) != (twin.type_name, twin.shape):
                return False
            first.seek(info.offset)
            second.seek(twin.offset)
            if first.read(info.n_bytes) != second.read(twin.n_bytes):
                return False
    return True


def measure(
    checkpoint: Path,
    quants: Sequence[str],
    repeat: int,
    threads: int,
    folder: Path,
    peer: Path | None,
    binaries: Path | None,
    kernels: str | None = None,
) -> dict[str, Any]:
    """Runs of each side in turns, medians, ratios, peaks, and whether the files are the same."""
    sides = {"yarn-edge": Side()} | ({"llama.cpp": Side()} if peer else {})
    same: dict[str, bool] = {}
    with bar("Converting", repeat * len(sides)) as advance:
        for turn in range(repeat):
            with tempfile.TemporaryDirectory(prefix="convert-speed-", dir=folder) as inside:
                work = Path(inside)
                for name in sorted(sides, reverse=bool(turn % 2)):
                    commands = ours(checkpoint, quants, threads, work, kernels)
                    if name == "llama.cpp" and peer and binaries:
                        commands = theirs(checkpoint, quants, threads, work, peer, binaries)
                    os.sync()  # neither side waits for what the other left to write
                    sides[name].runs.append([run_process(command) for command in commands])
                    advance(1)
                    seconds = ", ".join(f"{p.seconds:.1f}" for p in sides[name].runs[-1])
                    note(f"{name}: {seconds} s")
                if peer and not same:
                    same = {q: same_data(work / f"ours-{q}.gguf", work / f"theirs-{q}.gguf") for q in quants}
    return _told(checkpoint, quants, threads, sides, same)


def _told(
    checkpoint: Path, quants: Sequence[str], threads: int, sides: dict[str, Side], same: dict[str, bool]
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "quants": list(quants),
        "threads": threads,
        "seconds": {name: [[round(p.seconds, 2) for p in run] for run in side.runs] for name, side in sides.items()},
        "median_s": {name: round(side.median_s(), 2) for name, side in sides.items()},
        "peak_rss_bytes": {name: side.peak("rss_bytes") for name, side in sides.items()},
        "peak_anonymous_bytes": {name: side.peak("anonymous_bytes") for name, side in sides.items()},
        "same_data": same,
    }
    if "llama.cpp" in sides:
        peer = sides["llama.cpp"]
        found["ratio"] = round(sides["yarn-edge"].median_s() / peer.median_s(), 3)
        again = statistics.median(run[0].seconds for run in peer.runs) * (len(quants) - 1)
        found["ratio_with_a_conversion_for_each"] = round(sides["yarn-edge"].median_s() / (peer.median_s() + again), 3)
    return found


def _table(found: dict[str, Any]) -> str:
    lines = ["| side | median s | peak memory MB | anonymous MB |", "|---|---|---|---|"]
    for name, seconds in found["median_s"].items():
        rss, anonymous = (found[f"peak_{which}_bytes"][name] / 1e6 for which in ("rss", "anonymous"))
        lines.append(f"| {name} | {seconds:.1f} | {rss:.0f} | {anonymous:.0f} |")
    if "ratio" in found:
        lines.append(f"\nyarn-edge / llama.cpp: {found['ratio']:.2f}; tensor data the same: {found['same_data']}")
        if len(found["quants"]) > 1:
            each = found["ratio_with_a_conversion_for_each"]
            lines.append(f"where their converter runs once for each type: {each:.2f}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print the table, or JSON. Returns 1 if the files of both sides differ."""
    parser = argparse.ArgumentParser(
        prog="convert_speed", description="Time and memory of converting, next to llama.cpp."
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", type=Path, metavar="DIR", help="llama.cpp's source, with convert_hf_to_gguf.py")
    parser.add_argument("--bin", type=Path, metavar="DIR", help="its programs (default: build/bin in --peer)")
    parser.add_argument("--quant", default="Q4_K_M", metavar="TYPE[,TYPE…]")
    parser.add_argument("--kernels", choices=(GGML, FAST), help="ours (default: as convert chooses)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=physical_threads(), metavar="N")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where files are made"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    try:
        quants = [q.name for q in parse_quants(args.quant)]
        binaries = args.bin or (args.peer and args.peer / "build" / "bin")
        needed = [args.peer / "convert_hf_to_gguf.py", binaries / "llama-quantize"] if args.peer else []
        for path in (args.checkpoint, args.folder, *needed):
            if not path.exists() and shutil.which(str(path)) is None:
                raise YarnEdgeError(f"{path}: is not there")
        if args.repeat < 1:
            raise YarnEdgeError("--repeat is below 1")
        found = measure(
            args.checkpoint, quants, args.repeat, args.threads, args.folder, args.peer, binaries, args.kernels
        )
    except YarnEdgeError as error:
        sys.stderr.write(f"convert_speed: error: {error}\n")
        return 2
    sys.stdout.write(json.dumps(found) + "\n" if args.json else _table(found))
    return int(not all(found["same_data"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
