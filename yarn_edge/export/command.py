"""`yarn-edge export`: what another program must be given to run this GGUF at its own positions, or one line on why it cannot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.export.programs import EXPORT_PROGRAMS, ExportNames, untold
from yarn_edge.export.subject import ExportSubject
from yarn_edge.flags import length
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.progress import note
from yarn_edge.stdout import write_json, write_text
from yarn_edge.writer import check_output, write_file


def export(
    path: str | Path, program: str, *, ctx: int | None = None, names: ExportNames | None = None
) -> tuple[str, list[str]]:
    """(the text for `program`, notes for people). program: a key of EXPORT_PROGRAMS. ctx: tokens, None for the file's context.

    Raises YarnEdgeError if the program would run other positions than the file's, or if llama.cpp cannot load the file.
    """
    row, names = EXPORT_PROGRAMS[program], names or ExportNames()
    if not row.named and (names.name or names.repository):
        raise YarnEdgeError(f"--name and --repo are for {_named()}: {row.title} has no use for them")
    file = read_gguf(path)
    check_loadable(file)
    subject = ExportSubject(file, ctx or file.required_int("context_length"))
    text = row.write(subject, names)
    return text, [*row.notes, *_notes(subject, program)]


def _named() -> str:
    return ", ".join(name for name, row in EXPORT_PROGRAMS.items() if row.named)


def _notes(subject: ExportSubject, program: str) -> Sequence[str]:
    row, told = EXPORT_PROGRAMS[program], list[str]()
    if not subject.has_chat_template:
        told.append(f"the file has no chat template: {row.without_template}")
    left_out = untold(subject, program)
    if left_out:
        told.append(f"{row.title} has no name for the file's sampling defaults {', '.join(left_out)}")
    return told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `yarn-edge export`."""
    parser.add_argument("model", metavar="MODEL.gguf")
    parser.add_argument(
        "--for",
        dest="program",
        required=True,
        choices=tuple(EXPORT_PROGRAMS),
        help="a Modelfile, a model.yaml, a command line, or a command line with --hf-overrides",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write this file (default: stdout)")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    parser.add_argument(
        "--ctx",
        type=length,
        metavar="N",
        help="context in tokens that the program opens (default: the model's whole context)",
    )
    parser.add_argument(
        "--name", metavar="PUBLISHER/MODEL", help="for lmstudio: what the model is called (default: local/FILE)"
    )
    parser.add_argument(
        "--repo",
        metavar="ORG/NAME",
        help="for lmstudio: the Hugging Face repository that has the file (default: none, a local file)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """`yarn-edge export`."""
    names = ExportNames(args.output, args.name, args.repo)
    text, notes = export(args.model, args.program, ctx=args.ctx, names=names)
    if args.output is not None:
        output = check_output(args.output, args.force, [Path(args.model)])
        write_file(output, text, args.force)
    for sentence in notes:
        note(f"note: {sentence}")
    if args.json:
        write_json({"model": args.model, "for": args.program, "text": text, "notes": notes, "output": args.output})
    elif args.output is None:
        write_text(text)
    return 0
