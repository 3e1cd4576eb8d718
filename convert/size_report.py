"""What `--size` with `--dry-run` tells: the chosen type of each tensor, and what files of other sizes and of the usual types would lose."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence

import numpy as np

from yarn_edge.errors import YarnEdgeError
from yarn_edge.report.deliver import check_outputs, deliver
from yarn_edge.report.report import Chart, HeatMap, Line, Picture, Report, Table
from yarn_edge.runtime.ggml_types import GGMLType

from .file_plan import FilePlan
from .job import QuantizationJob
from .sizing.allocate import tensor_bytes
from .sizing.sized import SizePlan, best_types

STANDARD = ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
_SIZES = 16  # of the curve
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")


def check_picture(args: argparse.Namespace) -> None:
    """Raise YarnEdgeError if --plot cannot be drawn."""
    if args.plot is None:
        return
    if args.size is None or not args.dry_run:
        raise YarnEdgeError("--plot draws the plan of --size: pass --size and --dry-run as well")
    check_outputs(_with_report(args))


def _with_report(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "report": None, "text": None})


def tell_sizes(sized: SizePlan, job: QuantizationJob, standard: Sequence[FilePlan], args: argparse.Namespace) -> int:
    """Print the plan as tables, with --json as data, with --plot as a picture too. standard: plans of the files to compare with."""
    own = job.files[0]
    files = [("--size " + args.size, own, sized.nats(own.recipe.types))]
    files += [(plan.quant.name, plan, sized.nats(plan.recipe.types)) for plan in standard]
    totals = Table(
        "Files",
        ("types", "MB", "bits per weight", "nats expected"),
        tuple(
            (name, plan.layout.file_bytes / 1e6, plan.bits_per_weight, None if math.isnan(nats) else nats)
            for name, plan, nats in files
        ),
        "nats: KL to the 16-bit model for each token, all with error feedback; above about 0.3 it is less than that",
    )
    tensors = Table(
        "Tensors",
        ("tensor", "type", "MB", "nats expected"),
        tuple(
            (cost.name, sized.types[cost.name].name, tensor_bytes(cost, sized.types[cost.name]) / 1e6, cost.nats[kind])
            for cost in sized.costs
            for kind in [sized.types[cost.name]]
        ),
        digits=4,
    )
    pictures = (_frontier(sized, own, standard), *_types_by_layer(sized))
    data = {
        "files": [
            {"types": name, "file_bytes": plan.layout.file_bytes, "bits_per_weight": plan.bits_per_weight, "nats": nats}
            for name, plan, nats in files
        ],
        "tensors": [
            {"name": c.name, "type": kind.name, "bytes": tensor_bytes(c, kind), "nats": c.nats[kind]}
            for c in sized.costs
            for kind in [sized.types[c.name]]
        ],
        "written": False,
    }
    deliver(_with_report(args), data, Report(f"{own.path.name}: types by sensitivity", (), (tensors, totals), pictures))
    return 0


def _frontier(sized: SizePlan, own: FilePlan, standard: Sequence[FilePlan]) -> Picture:
    """Expected nats by size: of chosen types, and of the usual ones."""
    fixed = own.layout.file_bytes - sum(tensor_bytes(c, sized.types[c.name]) for c in sized.costs)
    least, most = (sum(pick(tensor_bytes(c, kind) for kind in c.nats) for c in sized.costs) for pick in (min, max))
    points = []
    for budget in np.geomspace(least, most, _SIZES):
        types = best_types(sized.costs, sized.own, max(least, math.ceil(budget)))
        points.append((fixed + _bytes_of(sized, types), sized.nats(types)))
    usual = [(plan.layout.file_bytes, sized.nats(plan.recipe.types)) for plan in standard]
    usual = [(size, nats) for size, nats in usual if not math.isnan(nats)]
    lines = [_line("chosen types", points), _line(" · ".join(plan.quant.name for plan in standard), usual)]
    marks = ((own.layout.file_bytes / 1e6, "--size"),)
    return Chart("What each size loses", "MB", "nats expected", tuple(lines), log_y=True, marks=marks)


def _line(label: str, points: Sequence[tuple[float, float]]) -> Line:
    return Line(label, tuple(size / 1e6 for size, _ in points), tuple(nats for _, nats in points))


def _bytes_of(sized: SizePlan, types: dict[str, GGMLType]) -> int:
    return sum(tensor_bytes(cost, types[cost.name]) for cost in sized.costs)


def _types_by_layer(sized: SizePlan) -> list[Picture]:
    """Bits per weight of each matrix in each layer; nothing for a model of one layer."""
    bits = {}
    for cost in sized.costs:
        named = _LAYER.fullmatch(cost.name)
        if named is not None:
            kind = sized.types[cost.name]
            bits[named[2], int(named[1])] = 8 * kind.block_bytes / kind.block
    rows, layers = list(dict.fromkeys(row for row, _ in bits)), sorted({layer for _, layer in bits})
    if len(layers) < 2:
        return []
    values = tuple(tuple(bits.get((row, layer), math.nan) for layer in layers) for row in rows)
    return [HeatMap("Bits per weight", "layer", "", tuple(map(str, layers)), tuple(rows), values, low=2.0, high=8.5)]
