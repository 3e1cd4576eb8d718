"""What other quantizers lose at the same bytes: KL divergence from the 16-bit model on held-out texts, as `compare` measures it.

    python -m yarn_edge.bench.peers.quantized CHECKPOINT --calibrate A.txt,B.txt --text X.txt,Y.txt --peer DIR

Each side makes its file from the same tokens: llama-imatrix with llama-quantize, AutoRound (--auto-round), and `yarn-edge --calibrate`
with the type's own mixture, with types chosen for the peer's bytes, and at --sizes. --also adds files made elsewhere. Files that are in
--folder already are used as they are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count, length_from
from yarn_edge.progress import bar
from yarn_edge.runtime.model import Model
from yarn_edge.text_file import read_text
from yarn_edge.writer import write_file

from ..speed.command import listed
from .llama_bench import executable
from .race import Race, Results, add_folder_flag
from .turns import YARN_EDGE, command_line, markdown, run_process

PEER, WINDOW, CHUNK = "llama-quantize", 2048, 512
SPARE = 16  # tokens by which a window may shrink when its text is tokenized by itself


@dataclass(frozen=True)
class QuantizedSide:
    """A side, its file, and the commands that make it. left_in: a folder in which they leave it under a name of their own."""

    name: str
    file: Path
    commands: Sequence[Sequence[str]] = ()
    left_in: Path | None = None

    def make(self) -> float | None:
        """Run the commands. Returns their seconds; None if the file is there. Raises YarnEdgeError if they leave no file."""
        if self.file.exists():
            return None
        seconds = sum(run_process(self.name, command).seconds for command in self.commands)
        if self.left_in is not None:
            for left in self.left_in.rglob("*.gguf"):
                left.rename(self.file)
        if not self.file.is_file():
            raise YarnEdgeError(f"{self.name}: there is no {self.file}")
        return seconds


def calibration_files(model: Path, texts: Sequence[Path], tokens: int, folder: Path) -> tuple[Path, Path]:
    """The first tokens of each text, the same number of each: as one text, and as JSON Lines of windows for AutoRound."""
    parts, windows, each = [], [], tokens // len(texts)
    with Model(model, vocab_only=True) as loaded:
        for path in texts:
            found = loaded.tokenize(read_text(path), add_special=False, parse_special=False)[: each + SPARE]
            if len(found) < each + SPARE:
                raise YarnEdgeError(f"{path}: has {len(found)} tokens: {each + SPARE} are needed")
            text = [
                b"".join(map(loaded.token_bytes, found[a:b])).decode(errors="ignore")
                for a, b in [(0, each), *((a, a + WINDOW + SPARE) for a in range(0, each - WINDOW + 1, WINDOW))]
            ]
            parts.append(text[0])
            windows += [json.dumps({"text": window}) for window in text[1:]]
    whole, lines = folder / "calibration.txt", folder / "calibration.jsonl"
    write_file(whole, "".join(parts), force=True)
    write_file(lines, "\n".join(windows) + "\n", force=True)
    return whole, lines


def peer_side(args: argparse.Namespace, base: Path, text: Path) -> QuantizedSide:
    """llama.cpp's own two programs."""
    imatrix, quantize = (executable(args.peer, name) for name in ("llama-imatrix", PEER))
    matrix, file = args.folder / "llama-imatrix.gguf", args.folder / f"{PEER}-{args.quant}.gguf"
    read = command_line([imatrix], m=base, f=text, o=matrix, c=CHUNK, t=args.threads, no_ppl=True)
    write = [quantize, "--imatrix", matrix, base, file, args.quant, args.threads]
    return QuantizedSide(f"{PEER} {args.quant}, llama-imatrix", file, [read, command_line(write)])


def auto_round_side(args: argparse.Namespace, iterations: int, windows: Path) -> QuantizedSide:
    """AutoRound on the CPU: rounding with an importance matrix at 0 iterations, what its manual advises for GGUF otherwise."""
    folder = args.folder / f"auto-round-{iterations}"
    n = args.calibrate_tokens // len(args.calibrate) // WINDOW * len(args.calibrate)
    flags = {
        "model": args.checkpoint,
        "format": f"gguf:{args.quant.lower()}",
        "iters": iterations,
        "output_dir": folder,
    }
    flags |= {"dataset": windows, "seqlen": WINDOW, "nsamples": n, "batch_size": 1, "device": "cpu"}
    more = ("--enable_alg_ext", "--not_use_best_mse", "--disable_torch_compile") if iterations else ()
    line = [str(args.auto_round), *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))), *more]
    name = f"AutoRound {args.quant}, {iterations} iterations"
    return QuantizedSide(name, args.folder / f"auto-round-{iterations}-{args.quant}.gguf", [line], folder)


def our_side(args: argparse.Namespace, name: str, size: str | None) -> QuantizedSide:
    """`convert --calibrate`, with --size."""
    file = args.folder / f"yarn-edge-{args.quant}{f'-{size}' if size else ''}.gguf"
    texts = ",".join(map(str, args.calibrate))
    shared = {"calibrate": texts, "calibrate_tokens": args.calibrate_tokens, "threads": args.threads}
    line = command_line(
        YARN_EDGE, "convert", args.checkpoint, o=file, quant=args.quant, size=size, quiet=True, **shared
    )
    return QuantizedSide(f"yarn-edge {name}", file, [line])


def divergences(base: Path, files: Sequence[Path], text: Path, max_tokens: int) -> list[dict[str, Any]]:
    """What `compare` says about each file on a text."""
    flags = {"text": text, "ctx": WINDOW, "chunks": -(-max_tokens // WINDOW), "max_tokens": max_tokens}
    line = command_line(YARN_EDGE, "compare", base, *files, json=True, quiet=True, **flags)
    kept = ("n_tokens", "kld_mean", "kld_stderr", "top1", "top1_stderr", "ppl_ratio", "ppl_ratio_stderr")
    models = json.loads(run_process("yarn-edge compare", line).stdout)["models"]
    return [{key: model[key] for key in kept} for model in models]


def equal_bytes(bytes_kld: Sequence[tuple[int, float]], kld: float) -> float | None:
    """The size at which a file loses `kld`, between two of the sizes measured: log KL is linear in bytes. None beyond them."""
    points = sorted((math.log(loss), size) for size, loss in bytes_kld)
    losses, sizes = zip(*points, strict=True)
    found = float(np.interp(math.log(kld), losses, sizes, left=math.nan, right=math.nan))
    return None if math.isnan(found) else found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add, paths = parser.add_argument, lambda text: [Path(word) for word in text.split(",")]
    add("checkpoint", type=Path, metavar="CHECKPOINT")
    add("--calibrate", type=paths, required=True, metavar="TEXT[,TEXT…]", help="texts that every side reads")
    add(
        "--calibrate-tokens", type=length_from(1024), default=16384, metavar="N", help="tokens of them (default: 16384)"
    )
    add("--text", type=paths, required=True, metavar="TEXT[,TEXT…]", help="held-out texts")
    add("--max-tokens", type=length_from(1024), default=4096, metavar="N", help="of each of them (default: 4096)")
    add("--quant", default="Q4_K_M", metavar="TYPE", help="default: %(default)s")
    add("--peer", type=Path, required=True, metavar="DIR", help="folder with llama-imatrix and llama-quantize")
    add("--auto-round", type=Path, metavar="PROGRAM", help="AutoRound's program")
    text = "its iterations, separated by commas (default: 0)"
    add("--iters", type=listed(count(0, 10000)), default=[0], help=text, metavar="N")
    text = "other sizes of our files, such as 4.4bpw,4.6bpw"
    add("--sizes", type=lambda text: text.split(","), default=[], metavar="SIZE[,SIZE…]", help=text)
    text = "another file to compare; may be repeated"
    add("--also", type=Path, action="append", default=[], metavar="FILE.gguf", help=text)
    add_folder_flag(parser)


def run(args: argparse.Namespace, results: Results) -> None:
    """Make the files, then compare them on each text."""
    args.folder.mkdir(exist_ok=True)
    base = args.folder / "base-BF16.gguf"
    convert = command_line(YARN_EDGE, "convert", args.checkpoint, o=base, quant="BF16", quiet=True)
    QuantizedSide("yarn-edge convert", base, [convert]).make()
    whole, windows = calibration_files(base, args.calibrate, args.calibrate_tokens, args.folder)
    first = peer_side(args, base, whole)
    sides, seconds = [first], [first.make()]
    if args.auto_round is not None:
        sides += [auto_round_side(args, n, windows) for n in args.iters]
    sides += [QuantizedSide(path.name, path) for path in args.also]
    sides += [our_side(args, "--calibrate, same types", None)]
    sides += [
        our_side(args, f"--calibrate --size {size}", size)
        for size in (str(first.file.stat().st_size) + "B", *args.sizes)
    ]
    with bar("Quantizing", len(sides)) as advance:
        for side in sides[1:]:
            seconds.append(side.make())
            advance(1, side.name)
    rows: list[dict[str, Any]] = [
        {"side": side.name, "bytes": side.file.stat().st_size, "seconds": took, "texts": {}}
        for side, took in zip(sides, seconds, strict=True)
    ]
    results |= {"checkpoint": str(args.checkpoint), "tokens": args.calibrate_tokens, "sides": rows}
    for text in args.text:
        found = divergences(base, [side.file for side in sides], text, args.max_tokens)
        for row, figures in zip(rows, found, strict=True):
            row["texts"][text.stem] = figures
    results["equal_bytes"] = _equal(rows)


def _equal(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """By text: the bytes of our file with chosen types that loses what the first side loses, divided by that side's bytes."""
    sized = [row for row in rows if "--size" in row["side"]]
    ratios = {}
    for text, figures in rows[0]["texts"].items():
        found = equal_bytes([(row["bytes"], row["texts"][text]["kld_mean"]) for row in sized], figures["kld_mean"])
        ratios[text] = None if found is None else found / rows[0]["bytes"]
    return ratios


def _tables(results: Results) -> str:
    rows = results["sides"]
    texts = list(rows[0]["texts"])
    cells = []
    for row in rows:
        took = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        found = [(row["texts"][text], rows[0]["texts"][text]) for text in texts]
        losses = [
            f"{own['kld_mean']:.4f} ± {own['kld_stderr']:.4f} ({own['kld_mean'] / first['kld_mean']:.2f})"
            for own, first in found
        ]
        tops = [f"{own['top1']:.1%}" for own, _first in found]
        cells.append([row["side"], f"{row['bytes'] / 1e6:.2f}", took, *losses, *tops])
    table = markdown(
        ["side", "MB", "seconds", *(f"KL, {text}" for text in texts), *(f"top-1, {text}" for text in texts)], cells
    )
    equal = [
        f"{text} {'beyond --sizes' if ratio is None else f'{ratio:.3f}'}"
        for text, ratio in results["equal_bytes"].items()
    ]
    return f"{table}\nbytes of ours that lose as much as {rows[0]['side']}, divided by its bytes: {', '.join(equal)}\n"


RACE = Race("quantized", "What quantizers lose at the same bytes.", add_arguments, run, _tables)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
