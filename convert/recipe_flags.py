"""The flags that `convert` and `quantize` share, and the values they become."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.flags import add_threads_flag, length_from
from yarn_edge.runtime.ggml_types import QUANTIZABLE, GGMLType, type_named
from yarn_edge.text_file import read_text
from yarn_edge.writer import check_output

from .calibration import Calibration
from .kernels.choose import FAST, GGML
from .moments.collect import LEAST_WINDOW, CalibrationSettings
from .outputs import OutputOptions
from .recipe import QuantOptions

DEFAULT_QUANT = "Q4_K_M"
_MAX_PATTERN = 200  # llama.cpp matches recursively: a long pattern overflows its stack and ends the process
_MAX_REPEATS = 3  # it backtracks through every way to match: more repeats can take hours


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that describe the quantized files."""
    text = "output file; {quant} in the name becomes the type's name"
    parser.add_argument("-o", "--output", required=True, metavar="OUT.gguf", help=text)
    text = "file types by llama.cpp's names, separated by commas (default: Q4_K_M)"
    parser.add_argument("--quant", metavar="TYPE[,TYPE…]", help=text)
    text = "importance matrix made by yarn-edge imatrix or llama-imatrix"
    parser.add_argument("--imatrix", metavar="FILE", help=text)
    text = (
        "texts of several kinds, separated by commas: the model reads them, and K-quants are then rounded with error "
        "feedback, which makes the same bytes better (needs yarn-edge[fast])"
    )
    parser.add_argument("--calibrate", metavar="TEXT[,TEXT…]", help=text)
    text = f"tokens that --calibrate reads, the same number of each text (default: {CalibrationSettings.tokens})"
    parser.add_argument("--calibrate-tokens", type=length_from(1024), metavar="N", help=text)
    text = (
        "file of --calibrate's moments, which is also an importance matrix: read in place of the texts if it is there (then "
        "--calibrate may be left out), or else written"
    )
    parser.add_argument("--moments", metavar="FILE", help=text)
    parser.add_argument("--pure", action="store_true", help="use one type for all tensors instead of a mixture")
    text = "type of the tensors whose name matches, such as attn_v=q8_0; may be repeated"
    parser.add_argument(
        "--tensor-type", action="append", default=[], type=_tensor_type, metavar="REGEX=TYPE", help=text
    )
    parser.add_argument("--output-type", type=_type, metavar="TYPE", help="type of output.weight")
    parser.add_argument("--embedding-type", type=_type, metavar="TYPE", help="type of token_embd.weight")
    text = "kernels that make the K-quants: ggml, or fast, which needs yarn-edge[fast] (default: whichever is faster)"
    parser.add_argument("--kernels", choices=(GGML, FAST), help=text)
    text = "print the plan, the sizes and the expected time; write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--force", action="store_true", help="overwrite an existing output")
    add_threads_flag(parser)


def output_options(args: argparse.Namespace) -> OutputOptions:
    """-o, --quant and --force."""
    return OutputOptions(args.output, args.quant or DEFAULT_QUANT, args.force)


def quant_options(args: argparse.Namespace) -> QuantOptions:
    """--imatrix, --kernels, and the flags that choose types. --calibrate needs our own kernels."""
    tensor_types = tuple(args.tensor_type)
    kernels = args.kernels or (FAST if args.calibrate or args.moments else None)
    return QuantOptions(args.imatrix, kernels, args.pure, tensor_types, args.output_type, args.embedding_type)


def calibration_of(args: argparse.Namespace) -> Calibration | None:
    """--calibrate, --calibrate-tokens and --moments. Raises YarnEdgeError if they do not go with the other flags."""
    kept = None if args.moments is None else Path(args.moments)
    if args.calibrate is None and args.calibrate_tokens is not None:
        raise YarnEdgeError("--calibrate-tokens says how much --calibrate reads: pass --calibrate TEXT as well")
    if args.calibrate is None and kept is None:
        return None
    if args.imatrix is not None:
        raise YarnEdgeError("--calibrate measures an importance of its own: leave out --imatrix")
    if args.kernels == GGML:
        raise YarnEdgeError("--calibrate rounds with our own kernels: leave out --kernels ggml")
    if kept is not None and not kept.exists():
        if args.calibrate is None:
            raise YarnEdgeError(f"{kept}: does not exist: pass --calibrate TEXT,TEXT to make it")
        check_output(kept, False)
    return Calibration(None if args.calibrate is None else _settings(args), kept)


def _settings(args: argparse.Namespace) -> CalibrationSettings:
    texts = {name: read_text(Path(name)) for name in args.calibrate.split(",") if name}
    if not texts:
        raise YarnEdgeError("--calibrate is empty: name one or more texts")
    for name, text in texts.items():
        if len(text) < LEAST_WINDOW:  # a token has a character at least
            raise YarnEdgeError(
                f"{name}: has {len(text)} characters: calibration needs at least {LEAST_WINDOW} tokens of each text"
            )
    return CalibrationSettings(texts, args.calibrate_tokens or CalibrationSettings.tokens, threads=args.threads)


def _type(text: str) -> GGMLType:
    try:
        kind = type_named(text)
    except YarnEdgeError:
        kind = None
    if kind is None or kind.name not in QUANTIZABLE:
        known = ", ".join(name.lower() for name in QUANTIZABLE)
        raise argparse.ArgumentTypeError(
            f"{one_line(repr(text), 40)} is not a tensor type to quantize to; known: {known}"
        )
    return kind


def _tensor_type(text: str) -> tuple[str, GGMLType]:
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern:
        raise argparse.ArgumentTypeError(f"{one_line(repr(text), 60)} is not REGEX=TYPE, such as attn_v=q8_0")
    if len(pattern) > _MAX_PATTERN or not pattern.isprintable():
        raise argparse.ArgumentTypeError(
            f"the pattern has {len(pattern)} characters: at most {_MAX_PATTERN} are allowed, all printable"
        )
    if len(re.findall(r"[*+{]", pattern)) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        raise argparse.ArgumentTypeError(
            f"{one_line(repr(pattern), 60)} repeats too much to be matched in time: "
            f"use at most {_MAX_REPEATS} of * + {{, and none after a group"
        )
    return pattern, _type(kind)
