"""How long it takes to make quantized GGUFs from a checkpoint, and in how much memory, next to llama.cpp's two programs.

`python -m yarn_edge.bench.peers.convert CHECKPOINT --peer LLAMA_CPP [--bin DIR] [--quant Q4_K_M] [--repeat 5]` runs in turns
`yarn-edge convert`, and `convert_hf_to_gguf.py` with one `llama-quantize` for each type. The checkpoint is in the page cache for
both, as far as memory reaches. Tensor data is compared byte by byte. Without --peer only ours is measured: so a model can be
timed whose files would not fit on the disk twice (`--shape 7B` of `evidence.random_checkpoint`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from yarn_edge.convert.kernels.choose import FAST, GGML
from yarn_edge.convert.quant_types import parse_quants
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf

from .race import Race, Results, add_folder_flag
from .turns import YARN_EDGE, Contender, command_line, run_turns, timing_table, timings

OURS, THEIRS = "yarn-edge", "llama.cpp"


def our_conversion(args: argparse.Namespace, quants: Sequence[str], folder: Path) -> Contender:
    """One process for all types."""
    output = folder / "{quant}.gguf"
    shared = {"threads": args.threads, "kernels": args.kernels, "quiet": True}
    line = command_line(YARN_EDGE, "convert", args.checkpoint, o=output, quant=",".join(quants), **shared)
    return Contender([line], partial(_empty, folder))


def their_conversion(args: argparse.Namespace, quants: Sequence[str], folder: Path, binaries: Path) -> Contender:
    """Upstream's converter to a 16-bit file, then its quantizer for each type."""
    between, script = folder / "between.gguf", (sys.executable, args.peer / "convert_hf_to_gguf.py")
    lines = [command_line(script, args.checkpoint, outtype="bf16", outfile=between)]
    for quant in quants:
        lines.append(
            command_line([binaries / "llama-quantize"], between, folder / f"{quant}.gguf", quant, args.threads)
        )
    return Contender(lines, partial(_empty, folder))


def _empty(folder: Path) -> None:
    """Remove what the turn before made. Neither side waits for what the other left to write."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of a Hugging Face checkpoint")
    add("--peer", type=Path, metavar="DIR", help="source tree of llama.cpp, with convert_hf_to_gguf.py")
    add("--bin", type=Path, metavar="DIR", help="folder with llama-quantize (default: build/bin of --peer)")
    add("--quant", default="Q4_K_M", metavar="TYPE[,TYPE…]", help="types to make (default: Q4_K_M)")
    add("--kernels", choices=(GGML, FAST), help="kernels of yarn-edge convert (default: its own choice)")
    add_folder_flag(parser)


def run(args: argparse.Namespace, results: Results) -> None:
    """Both sides in turns, and whether their files are the same."""
    quants = [q.name for q in parse_quants(args.quant)]
    binaries = args.bin or (args.peer and args.peer / "build" / "bin")
    needed = [args.peer / "convert_hf_to_gguf.py", binaries / "llama-quantize"] if args.peer else []
    for path in (args.checkpoint, args.folder, *needed):
        if not path.exists():
            raise YarnEdgeError(f"{path}: no such file or folder")
    with tempfile.TemporaryDirectory(prefix="convert-race-", dir=args.folder) as inside:
        ours, theirs = (Path(inside, side) for side in ("ours", "theirs"))
        sides = {OURS: our_conversion(args, quants, ours)}
        if args.peer:
            sides[THEIRS] = their_conversion(args, quants, theirs, binaries)
        turns = run_turns("Converting", sides, args.repeat)
        same = {q: same_data(ours / f"{q}.gguf", theirs / f"{q}.gguf") for q in quants} if args.peer else {}
    results |= {"checkpoint": str(args.checkpoint), "quants": quants, "threads": args.threads, **timings(turns)}
    results["process_seconds"] = {name: [[p.seconds for p in turn] for turn in runs] for name, runs in turns.items()}
    results["same_data"] = same
    if args.peer:
        own, other = (results["median_s"][name] for name in (OURS, THEIRS))
        conversion = statistics.median(turn[0] for turn in results["process_seconds"][THEIRS])
        results["ratio"] = own / other
        results["ratio_with_a_conversion_for_each"] = own / (other + conversion * (len(quants) - 1))


def _tables(results: Results) -> str:
    text = timing_table(results)
    if "ratio" in results:
        text += f"\nyarn-edge / llama.cpp: {results['ratio']:.2f}; tensor data the same: {results['same_data']}\n"
        if len(results["quants"]) > 1:
            each = results["ratio_with_a_conversion_for_each"]
            text += f"if their converter ran once for each type: {each:.2f}\n"
    return text


def _same(results: Results) -> bool:
    return all(results["same_data"].values())


RACE = Race(
    "convert", "Time and memory of converting, next to llama.cpp.", add_arguments, run, _tables, _same, repeat=5
)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
