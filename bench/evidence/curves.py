"""Curves of several measurements in one picture: perplexity by position, of `yarn-edge perplexity --json` or rows of a comparison.

python -m yarn_edge.bench.evidence.curves plain=plain.json tuned=tuned.json -o curves.png [--title TEXT] [--log]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.report.pictures import draw
from yarn_edge.report.report import Chart, Line
from yarn_edge.writer import check_output


def line_of(word: str) -> Line:
    """`NAME=FILE` or `FILE`. Raises YarnEdgeError for what is no result of perplexity."""
    name, _, path = word.rpartition("=")
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise os_error(error, path) from error
    except ValueError:
        raise YarnEdgeError(f"{path}: is no JSON") from None
    try:
        points = [((b["start"] + b["end"]) / 2, b["ppl"], b.get("stderr") or 0.0) for b in data["buckets"]]
    except (KeyError, TypeError):
        raise YarnEdgeError(f"{path}: has no buckets of `yarn-edge perplexity --json`") from None
    x, y, errors = (tuple(float(value) for value in values) for values in zip(*points, strict=True))
    return Line(name or Path(path).stem, x, y, errors)


def main() -> int:
    """Draw the picture. Returns 2 for bad input."""
    parser = argparse.ArgumentParser(prog="curves", description="Perplexity by position of several runs.")
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FILE.json")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.png")
    parser.add_argument("--title", default="Perplexity by position")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis of perplexity")
    parser.add_argument("--force", action="store_true", help="overwrite FILE.png")
    args = parser.parse_args()
    try:
        lines = tuple(map(line_of, args.runs))
        chart = Chart(args.title, "position (tokens)", "perplexity", lines, log_y=args.log)
        draw([chart], check_output(args.output, args.force), args.force)
    except YarnEdgeError as error:
        sys.stderr.write(f"curves: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
