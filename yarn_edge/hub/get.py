"""`yarn-edge get`: a GGUF or a checkpoint of the Hub, in the cache that all programs share. Prints its path."""

from __future__ import annotations

import argparse
from pathlib import Path

from yarn_edge.stdout import write_json, write_text

from .checkpoint import whole_checkpoint
from .ggufs import hub_gguf
from .reference import parse_reference
from .repository import list_repository


def get_from_hub(reference: str) -> Path:
    """The GGUF that `hf:ORG/NAME[@REVISION][:QUANT]` names (of a split one the first file), or a checkpoint's folder.

    It is downloaded to the shared cache unless it is there, and what is downloaded is hashed. A repository with GGUFs and a
    checkpoint gives the GGUF. Raises YarnEdgeError.
    """
    parsed = parse_reference(reference)
    if parsed.file or any(name.lower().endswith(".gguf") for name in list_repository(parsed).entries):
        return hub_gguf(parsed)
    return whole_checkpoint(parsed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge get`."""
    parser.add_argument(
        "reference",
        metavar="hf:ORG/NAME[:QUANT]",
        help="a repository of the Hub, @REVISION if not main, and of its GGUFs which (default: the only one, or Q4_K_M)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge get`."""
    path = get_from_hub(args.reference)
    if args.json:
        write_json({"reference": args.reference, "path": str(path)})
    else:
        write_text(f"{path}\n")
    return 0
