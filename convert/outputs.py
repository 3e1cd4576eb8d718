"""The files that `convert` and `quantize` write: their names, the room for them, their flags, and how they get made."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import add_threads_flag
from yarn_edge.gguf.edit_shards import publish_files
from yarn_edge.progress import bar, note
from yarn_edge.runtime.ggml_types import QUANTIZABLE, GGMLType, type_named
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.stdout import write_json, write_text
from yarn_edge.writer import check_output, check_space, partial_file

from .file_plan import FilePlan, Source, as_json, as_table, estimated_seconds, importance_weights
from .imatrix.matrix import ImportanceMatrix
from .kernels.choose import FAST, GGML
from .one_pass import fill
from .quant_types import Quant
from .recipe import TypeChoice

_MAX_PATTERN = 200  # llama.cpp matches by recursion, and a long one ends the process

_MAX_REPEATS = 3  # it tries every way to share a name's characters among them, for hours


def output_paths(output: str, quants: Sequence[Quant]) -> dict[Path, Quant]:
    """Output file -> type; `{quant}` in the name is filled in, and needed for several types."""
    if not output:
        raise YarnEdgeError("-o is empty; give the name of a file")
    if len(quants) > 1 and "{quant}" not in output:
        raise YarnEdgeError(f"-o {output}: {len(quants)} types were asked for, so the name must hold {{quant}}")
    return {Path(output.replace("{quant}", q.name)): q for q in quants}


def checked_paths(output: str, quants: Sequence[Quant], force: bool, sources: Sequence[Path]) -> dict[Path, Quant]:
    """`output_paths`, each of which can be written (`writer.check_output`)."""
    checked: dict[Path, Quant] = {}
    for path, quant in output_paths(output, quants).items():
        target = check_output(path, force, sources)
        if target in checked:
            raise YarnEdgeError(f"{path}: is the same file as the one for {checked[target].name}")
        checked[target] = quant
    return checked


def check_disk_room(plans: Sequence[FilePlan]) -> None:
    """Refuse before work what the disks cannot hold."""
    by_folder: dict[Path, int] = {}
    for plan in plans:
        by_folder[plan.path.parent] = by_folder.get(plan.path.parent, 0) + plan.layout.file_bytes
    for folder, n_bytes in by_folder.items():
        check_space(folder, n_bytes, "what was asked for")


def make_files(
    source: Source,
    plans: Sequence[FilePlan],
    matrix: ImportanceMatrix | None,
    check: Callable[[Path], None],
    *,
    threads: int | None = None,
    force: bool = False,
) -> list[Path]:
    """Write every planned file, let `check` read it back, and give all their names, or none. Returns the paths."""
    check_disk_room(plans)
    paths = [plan.path for plan in plans]
    with ExitStack() as stack:
        partials = [stack.enter_context(partial_file(path)) for path in paths]
        outputs = [plan.output(partial) for plan, partial in zip(plans, partials, strict=True)]
        label = ", ".join(plan.quant.name for plan in plans)
        with bar(label, source.n_bytes, "bytes") as advance:
            weights, kernels = importance_weights(source, matrix), plans[0].kernels
            fill(source.tensors, outputs, weights, threads or physical_threads(), advance, kernels)
        source.check_unchanged()
        for partial in partials:
            check(partial)
        publish_files(partials, paths, force)
    for plan in plans:
        size = plan.layout.file_bytes / 1e6
        note(f"{plan.path}: {plan.quant.name}, {size:.1f} MB, {plan.bits_per_weight:.2f} bits per weight")
    return paths


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say what the quantized files shall be; the same in convert and quantize."""
    parser.add_argument("--quant", default="Q4_K_M", metavar="TYPE[,TYPE…]", help="llama.cpp names (default: Q4_K_M)")
    parser.add_argument("--imatrix", metavar="FILE", help="importance matrix, by yarn-edge imatrix or llama-imatrix")
    parser.add_argument("--pure", action="store_true", help="one type for all tensors, no mixture")
    parser.add_argument(
        "--tensor-type", action="append", default=[], type=_tensor_type, metavar="REGEX=TYPE",
        help="the type of tensors whose name matches, such as attn_v=q8_0; may be given several times",
    )  # fmt: skip
    parser.add_argument("--output-type", type=_type, metavar="TYPE", help="the type of output.weight")
    parser.add_argument("--embedding-type", type=_type, metavar="TYPE", help="the type of token_embd.weight")
    parser.add_argument(
        "--kernels",
        choices=(GGML, FAST),
        help="who makes the K-quants: ggml, or yarn-edge[fast] (default: the sooner done)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, sizes and the time to expect; write nothing"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    add_threads_flag(parser)


def _type(text: str) -> GGMLType:
    try:
        kind = type_named(text)
    except YarnEdgeError:
        kind = None
    if kind is None or kind.name not in QUANTIZABLE:
        known = ", ".join(name.lower() for name in QUANTIZABLE)
        raise argparse.ArgumentTypeError(
            f"{one_line(repr(text), 40)} is no tensor type that can be made; there are {known}"
        )
    return kind


def _tensor_type(text: str) -> tuple[str, GGMLType]:
    pattern, found, kind = text.rpartition("=")
    if not found or not pattern:
        raise argparse.ArgumentTypeError(f"{one_line(repr(text), 60)} is not REGEX=TYPE, such as attn_v=q8_0")
    if len(pattern) > _MAX_PATTERN or not pattern.isprintable():
        raise argparse.ArgumentTypeError(f"a pattern of {len(pattern)} characters; at most {_MAX_PATTERN}, printable")
    if len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise argparse.ArgumentTypeError(
            f"{one_line(repr(pattern), 60)} repeats too much to be matched in time: at most {_MAX_REPEATS} of * + {{, none of a group"
        )
    return pattern, _type(kind)


def choice_of(args: argparse.Namespace) -> TypeChoice:
    """What `add_recipe_flags` got."""
    return TypeChoice(args.pure, tuple(args.tensor_type), args.output_type, args.embedding_type)


def carry_out(source: Source, plans: Sequence[FilePlan], args: argparse.Namespace, make: Callable[[], object]) -> int:
    """The end of both commands: with --dry-run print the plan, else `make` the files; --json prints either as data."""
    threads = args.threads or physical_threads()
    start = time.perf_counter()
    if args.dry_run:
        check_disk_room(plans)
        with bar("Measuring", 1):
            seconds = estimated_seconds(source, plans, threads)
    else:
        make()
        seconds = time.perf_counter() - start
    if args.json:
        write_json({**as_json(source, plans, seconds, threads), "written": not args.dry_run})
    elif args.dry_run:
        write_text(as_table(source, plans, seconds, threads))
    return 0
