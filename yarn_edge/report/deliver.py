"""What a measurement shows people: one description of tables and pictures; as text, as PNG, as one HTML page.

A command describes its outcome once, as a `Report`; `deliver` prints the tables (or --json), draws --plot and writes --report.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.progress import note
from yarn_edge.report.environment import environment
from yarn_edge.report.report import Report
from yarn_edge.stdout import write_json, write_text
from yarn_edge.writer import check_output, write_file

_SUFFIXES = {"plot": (".png",), "report": (".html", ".htm")}


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """--json, --plot, --report, --force: the same for every measuring command."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--plot", metavar="FILE.png", help="draw what was measured (needs yarn-edge[plot])")
    parser.add_argument(
        "--report", metavar="FILE.html", help="one page with tables, pictures and environment (needs yarn-edge[plot])"
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing outputs")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse outputs that cannot or must not be written, before hours of work: YarnEdgeError.

    That is: under another suffix, over an existing file without --force, over the text that is read (--text may be a
    page), both into one file, into a folder that is not there, without matplotlib.
    """
    given = {flag: Path(value) for flag in _SUFFIXES if (value := getattr(args, flag)) is not None}
    if len(given) == 2 and given["plot"].resolve() == given["report"].resolve():
        raise YarnEdgeError(f"--plot and --report both name {given['plot']}")
    text = getattr(args, "text", None)
    for flag, path in given.items():
        if path.suffix.lower() not in _SUFFIXES[flag]:
            raise YarnEdgeError(f"--{flag} {path}: the name must end in {' or '.join(_SUFFIXES[flag])}")
        check_output(path, args.force, [Path(text)] if text else [])
        from yarn_edge.report.pictures import need_matplotlib

        need_matplotlib(f"--{flag}")


def deliver(
    args: argparse.Namespace, data: Mapping[str, Any], report: Report, model_paths: Sequence[Path] = ()
) -> None:
    """Tables (or with --json `data` as one object) on stdout; --plot and --report as files, whole or not at all.

    data: values that JSON knows, NumPy's, and paths; what is not finite becomes null; "environment" and "command" are
    added. model_paths: files that the environment names with their size. Each output is made whatever became of the
    others; then the first failure is raised: YarnEdgeError, or the OSError of stdout (BrokenPipeError: its reader left).
    """
    command = str(getattr(args, "command_line", ""))
    where = environment(model_paths) if args.json or args.report is not None else {}
    added = {"environment": where, "command": command}
    outputs: list[Callable[[], None]] = [
        lambda: write_json({**data, **added}) if args.json else write_text(report_text(report))
    ]
    if args.plot is not None:
        outputs.append(lambda: _plot(report, Path(args.plot), args.force))
    if args.report is not None:
        outputs.append(lambda: _page(render_html(report, where, command), Path(args.report), args.force))
    failures: list[YarnEdgeError | OSError] = []
    for output in outputs:
        try:
            output()
        except (YarnEdgeError, OSError) as error:
            failures.append(error)
    # A reader that left (`| head`) is none beside a file that could not be written.
    failures.sort(key=lambda failure: isinstance(failure, BrokenPipeError))
    for failure in failures[1:]:
        if not isinstance(failure, BrokenPipeError):
            note(str(failure))
    if failures:
        raise failures[0]


def report_text(report: Report) -> str:
    """The tables as aligned lines, then the summary."""
    from yarn_edge.report.tables import table_text

    parts = [table_text(table) for table in report.tables]
    if report.summary:
        parts.append("".join(f"{one_line(sentence, 2000)}\n" for sentence in report.summary))
    return "\n".join(parts)


def render_html(report: Report, environment: Mapping[str, str], command: str) -> str:
    """One page that needs nothing else: the summary, the pictures, the tables, where it was measured and by which command.

    Raises YarnEdgeError without matplotlib.
    """
    from yarn_edge.report.page import page

    return page(report, environment, command)


def _plot(report: Report, path: Path, force: bool) -> None:
    from yarn_edge.report.pictures import draw

    draw(report.pictures, path, force)
    note(f"{path}: the picture")


def _page(html: str, path: Path, force: bool) -> None:
    write_file(path, html, force)
    note(f"{path}: the report")
