"""The outputs of a measuring command: tables or --json on stdout, --plot as a PNG, --report as one HTML page.

A command describes its outcome once, as a `Report` and as the values of its JSON; `deliver` writes what the flags request.
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
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw the results as a picture (needs yarn-edge[plot])")
    parser.add_argument(
        "--report",
        metavar="FILE.html",
        help="also write one page with tables, pictures and environment (needs yarn-edge[plot])",
    )
    parser.add_argument("--force", action="store_true", help="overwrite existing outputs")


def check_outputs(args: argparse.Namespace) -> None:
    """Raise YarnEdgeError for outputs that cannot or must not be written, before hours of work.

    These are: a wrong suffix, an existing file without --force, the text that is read (--text may be a page), one file for both
    outputs, a missing folder, and missing matplotlib.
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
    """Write the tables (with --json, `data` as one object) to stdout; write --plot and --report whole or not at all.

    data: values as in `stdout.plain`; "environment" and "command" are added. model_paths: files whose names and sizes the
    environment lists. Each output is written even if another failed. Then the first failure is raised: YarnEdgeError, or the
    OSError of stdout (BrokenPipeError if its reader left).
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
    # A file that could not be written matters more than a reader that left (`| head`).
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
    """One self-contained page: the summary, the pictures, the tables, the environment and the command.

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
