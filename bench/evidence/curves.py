"""Draws several measurements in one picture: perplexity by position, from files of `yarn-edge perplexity --json`.

python -m yarn_edge.bench.evidence.curves plain=plain.json tuned=tuned.json -o curves.png [--title TEXT] [--log]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.config_file import MAX_JSON_BYTES
from yarn_edge.errors import YarnEdgeError
from yarn_edge.regular_file import read_file_or_pipe
from yarn_edge.report.pictures import draw
from yarn_edge.report.report import Chart, Line
from yarn_edge.writer import check_output

from ..standalone import run_module


def line_of(word: str) -> Line:
    """The curve of `NAME=FILE` or `FILE`. Raises YarnEdgeError if the file is not a result of perplexity."""
    name, _, path = word.rpartition("=")
    try:
        data: Any = json.loads(read_file_or_pipe(Path(path), MAX_JSON_BYTES))
    except ValueError:
        raise YarnEdgeError(f"{path}: is not JSON") from None
    try:
        points = [((b["start"] + b["end"]) / 2, b["ppl"], b.get("stderr") or 0.0) for b in data["buckets"]]
    except (KeyError, TypeError):
        raise YarnEdgeError(f"{path}: has no buckets of `yarn-edge perplexity --json`") from None
    x, y, errors = (tuple(float(value) for value in values) for values in zip(*points, strict=True))
    return Line(name or Path(path).stem, x, y, errors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The runs and the picture."""
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--title", default="Perplexity by position", help="default: %(default)s")
    parser.add_argument("--log", action="store_true", help="draw perplexity on a logarithmic axis")
    parser.add_argument("--force", action="store_true", help="overwrite FILE.png")


def run(args: argparse.Namespace) -> int:
    """Draw the picture."""
    lines = tuple(map(line_of, args.runs))
    chart = Chart(args.title, "position (tokens)", "perplexity", lines, log_y=args.log)
    draw([chart], check_output(args.output, args.force), args.force)
    return 0


def main() -> int:
    """Returns 2 for bad input."""
    return run_module("evidence.curves", "Perplexity by position of several runs in one picture.", add_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
