"""Progress where there is no terminal: lines in a log, few and only of what takes long."""

from __future__ import annotations

import pytest

from yarn_edge import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("reading", 200) as advance:
        for _ in range(20):
            clock[0] += 10
            advance(10)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 30% after 60 s, about 140 s left",
        "reading: 60% after 120 s, about 80 s left",
        "reading: 90% after 180 s, about 20 s left",
    ]


def test_nothing_for_what_is_short_or_inside_another(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("reading", 100) as advance:
        with progress.bar("inside", 10) as inner:
            clock[0] += 59
            inner(5)
            inner(5)
        advance(50)
        clock[0] += 100
        advance(50)  # its end needs no line
    assert capsys.readouterr().err == ""


def test_what_is_worked_on_is_named(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("writing", 4) as advance:
        clock[0] += 61
        advance(1, "blk.0\x1b[31m")
    assert capsys.readouterr().err == "writing: blk.0 [31m: 25% after 61 s, about 183 s left\n"
