"""Progress on stderr for everything a user waits for: bars on a terminal, a line now and then in a log, nothing with --quiet.

rich draws the bars. This module decides when, so that no caller has to.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from yarn_edge.errors import one_line

Unit = Literal["bytes", "tokens", "steps", "percent"]


class Advance(Protocol):
    """Called with the amount done since the last call, and with what is being worked on if that is worth showing."""

    def __call__(self, amount: float, what: str = "") -> None: ...


_LINE_S = 60.0  # seconds between lines where there is no terminal
_quiet = False
_noting = True
_showing = False


def set_quiet(quiet: bool) -> None:
    """--quiet: no progress and no notes for the rest of the process."""
    global _quiet
    _quiet = quiet


def note(message: str) -> None:
    """One line on stderr for a person, harmless whatever names are in it; nothing with --quiet."""
    if _noting:
        show(one_line(message, 2000))


@contextmanager
def without_notes() -> Iterator[None]:
    """In the block, for work that repeats what was told already, notes are left out; bars are drawn."""
    global _noting
    before, _noting = _noting, False
    try:
        yield
    finally:
        _noting = before


def show(text: str) -> None:
    """`text` as it is (lines, colors) on stderr; nothing with --quiet. What strangers wrote in it must be harmless already."""
    if not _quiet:
        with contextlib.suppress(OSError):  # the work does not fail because a note cannot be written
            sys.stderr.write(text + "\n")
            sys.stderr.flush()


@contextmanager
def bar(label: str, total: float, unit: Unit = "steps") -> Iterator[Advance]:
    """A progress bar with rate and time left. Yields `advance(amount)`; amounts are in `unit`.

    Inside another bar nothing is drawn: the user waits for the outer one. Without a terminal, a line a minute says how far it is.
    """
    global _showing
    if _quiet or _showing:
        yield lambda _amount, _what="": None
        return
    if not sys.stderr.isatty():
        _showing = True
        try:
            yield _lines(one_line(label, 80), total)
        finally:
            _showing = False
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import DownloadColumn as BytesColumn
    from rich.progress import TransferSpeedColumn as ByteRateColumn
    from rich.text import Text

    label = one_line(label, 80)

    class RateColumn(ProgressColumn):
        def render(self, task: object) -> Text:
            speed = getattr(task, "speed", None)
            return Text(f"{speed:,.0f} {unit}/s" if speed else "")

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn()]
    if unit == "bytes":
        columns += [BytesColumn(), ByteRateColumn()]
    elif unit == "tokens":
        columns += [MofNCompleteColumn(), RateColumn()]
    columns.append(TimeRemainingColumn())
    _showing = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(label, total=total)

            def advance(amount: float, what: str = "") -> None:
                described = f"{label}: {one_line(what, 40)}" if what else label
                progress.update(task, advance=amount, description=described)

            yield advance
    finally:
        _showing = False


def _lines(label: str, total: float) -> Advance:
    """For a log: a line a minute."""
    began = told = time.monotonic()
    done = 0.0

    def advance(amount: float, what: str = "") -> None:
        nonlocal told, done
        done += amount
        now = time.monotonic()
        if now - told >= _LINE_S and 0 < done < total:
            told = now
            left = (now - began) * (total / done - 1)
            described = f"{label}: {one_line(what, 40)}" if what else label
            note(f"{described}: {done / total:.0%} after {now - began:.0f} s, about {left:.0f} s left")

    return advance
