"""`yarn-edge quantize`: a GGUF becomes quantized GGUFs, all of them from one reading. Also what `convert` ends in.

The types are llama.cpp's own choice (`recipe`), the arithmetic is ggml's, also where it is done faster (`kernels`); the files
are whole and checked before they get their names, or they are not there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import add_threads_flag
from yarn_edge.ggml_types import QUANTIZABLE, GGMLType, type_named, types
from yarn_edge.gguf_file import GGUFFile, TensorInfo, read_gguf
from yarn_edge.llama_api import physical_threads
from yarn_edge.loadable import check_loadable
from yarn_edge.progress import bar, note
from yarn_edge.source_file import SourceFile
from yarn_edge.writer import check_output, check_space, partial_file

from .file_plan import QUANTIZER, FilePlan, Source, as_json, as_table, estimated_seconds, plan_files, weights_of
from .gguf_shards import publish_files
from .imatrix import ImportanceMatrix, read_imatrix
from .kernels import FAST, GGML
from .one_pass import SourceTensor, fill
from .quant_types import Quant, parse_quants
from .recipe import Choice

_MAX_PATTERN = 200  # llama.cpp matches by recursion, and a long one ends the process
_MAX_REPEATS = 3  # it tries every way to share a name's characters among them, for hours
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


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


def check_room(plans: Sequence[FilePlan]) -> None:
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
    check_room(plans)
    paths = [plan.path for plan in plans]
    with ExitStack() as stack:
        partials = [stack.enter_context(partial_file(path)) for path in paths]
        outputs = [plan.output(partial) for plan, partial in zip(plans, partials, strict=True)]
        label = ", ".join(plan.quant.name for plan in plans)
        with bar(label, source.n_bytes, "bytes") as advance:
            weights, kernels = weights_of(source, matrix), plans[0].kernels
            fill(source.tensors, outputs, weights, threads or physical_threads(), advance, kernels)
        source.check_unchanged()
        for partial in partials:
            check(partial)
        publish_files(partials, paths, force)
    for plan in plans:
        size = plan.layout.file_bytes / 1e6
        note(f"{plan.path}: {plan.quant.name}, {size:.1f} MB, {plan.bits_per_weight:.2f} bits per weight")
    return paths


def gguf_source(file: GGUFFile) -> Source:
    """A GGUF, split or not, as something to quantize. Its files stay open."""
    files = {
        path: SourceFile(path, size=file.file_bytes, mtime_ns=file.mtime_ns) if path == file.path else SourceFile(path)
        for path in file.shards
    }
    kinds = types()
    tensors = []
    for info in file.tensors.values():
        if info.type_name not in kinds:
            raise YarnEdgeError(
                f"{info.path}: tensor {one_line(info.name, 100)} has the type {info.type_name}, unknown to ggml here"
            )
        tensors.append(_gguf_tensor(info, kinds[info.type_name], files[info.path]))
    header = files[file.path].read(file.header_end)
    entries = {key: header[e.start : e.end] for key, e in file.entries.items() if key not in _SPLIT_KEYS}

    def check_unchanged() -> None:
        for opened in files.values():
            opened.check_unchanged()

    return Source(file.path, entries, tensors, {t.name: t.kind for t in tensors}, file.alignment, check_unchanged)


def _gguf_tensor(info: TensorInfo, kind: GGMLType, file: SourceFile) -> SourceTensor:
    row_bytes = kind.row_bytes(info.shape[0])

    def read(first_row: int, out: Any) -> None:
        file.read_into(out, info.offset + first_row * row_bytes)

    return SourceTensor(info.name, info.shape, kind, read, f"{info.path}: tensor {one_line(info.name, 100)}")


def quantize(
    model: str | Path,
    output: str,
    quant: str = "Q4_K_M",
    *,
    imatrix: str | Path | None = None,
    choice: Choice | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    kernels: str | None = None,
) -> list[Path]:
    """Quantize a GGUF (of a split one its first file). Returns the files written, one for each type in `quant`.

    imatrix: a file of llama.cpp's kind. allow_requantize: also from types that are quantized already. kernels: "fast",
    "ggml", or None for what is done sooner. Raises YarnEdgeError when anything is wrong; then no file was written.
    """
    source, plans, matrix = plan_quantization(
        model, output, quant, imatrix=imatrix, choice=choice, allow_requantize=allow_requantize, force=force,
        kernels=kernels,
    )  # fmt: skip
    return make_files(source, plans, matrix, lambda path: _check(source, path), threads=threads, force=force)


def plan_quantization(
    model: str | Path,
    output: str,
    quant: str,
    *,
    imatrix: str | Path | None = None,
    choice: Choice | None = None,
    allow_requantize: bool = False,
    force: bool = False,
    kernels: str | None = None,
) -> tuple[Source, list[FilePlan], ImportanceMatrix | None]:
    """`quantize` as far as nothing is written."""
    quants = parse_quants(quant)
    file = read_gguf(model)
    check_loadable(file)
    paths = checked_paths(output, quants, force, [*file.shards, *([Path(imatrix)] if imatrix else [])])
    matrix = None if imatrix is None else read_imatrix(imatrix)
    source = gguf_source(file)
    return source, plan_files(source, paths, choice or Choice(), matrix, allow_requantize, kernels), matrix


def _check(source: Source, path: Path) -> None:
    """Read the header back: all tensors, and all keys but those that were to change."""
    written = read_gguf(path, vocabulary=False)
    if (
        list(written.tensors) != [t.name for t in source.tensors]
        or not source.entries.keys() - {QUANTIZER} <= written.metadata.keys()
    ):
        raise YarnEdgeError(f"{path}: the written file does not hold what was written: is the disk sound?")


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


def choice_of(args: argparse.Namespace) -> Choice:
    """What `add_recipe_flags` got."""
    return Choice(args.pure, tuple(args.tensor_type), args.output_type, args.embedding_type)


def carry_out(source: Source, plans: Sequence[FilePlan], args: argparse.Namespace, make: Callable[[], object]) -> int:
    """The end of both commands: with --dry-run print the plan, else `make` the files; --json prints either as data."""
    threads = args.threads or physical_threads()
    start = time.perf_counter()
    if args.dry_run:
        check_room(plans)
        with bar("Measuring", 1):
            seconds = estimated_seconds(source, plans, threads)
    else:
        make()
        seconds = time.perf_counter() - start
    if args.json:
        told = {**as_json(source, plans, seconds, threads), "written": not args.dry_run}
        sys.stdout.write(json.dumps(told) + "\n")
    elif args.dry_run:
        sys.stdout.write(as_table(source, plans, seconds, threads))
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge quantize`."""
    parser.add_argument("model", metavar="IN.gguf", help="F32, F16 or BF16; of a split one the first file")
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT.gguf", help="{quant} in it becomes the type's name"
    )
    parser.add_argument(
        "--allow-requantize", action="store_true", help="also from a quantized IN.gguf, which costs quality"
    )
    add_recipe_flags(parser)


def run(args: argparse.Namespace) -> int:
    """`yarn-edge quantize`."""
    source, plans, matrix = plan_quantization(
        args.model, args.output, args.quant, imatrix=args.imatrix, choice=choice_of(args),
        allow_requantize=args.allow_requantize, force=args.force, kernels=args.kernels,
    )  # fmt: skip

    def make() -> object:
        return make_files(
            source, plans, matrix, lambda path: _check(source, path), threads=args.threads, force=args.force
        )

    return carry_out(source, plans, args, make)
