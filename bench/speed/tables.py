"""Rows of `yarn-edge bench` as a table, as pictures and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yarn_edge.progress import note
from yarn_edge.report.report import Bars, Bound, Cell, Chart, Line, Picture, Report, Table
from yarn_edge.writer import partial_file, publish

from .rows import FLASH, Row, name_of

_FLASH_WORDS = {number: word for word, number in FLASH.items()}
# Columns that are shown where they differ from row to row: (name, key).
_DIFFERING = (("model", "model"), ("batch", "n_batch"), ("ubatch", "n_ubatch"), ("flash attention", "flash_attn"))
_ALWAYS = (("kv", "type_k"), ("threads", "n_threads"))
_PICTURES = (("Reading", ("pp", "ttft")), ("Generating", ("tg", "tg+s")))


def report_of(rows: Sequence[Row], env: Mapping[str, Any], complete: bool) -> Report:
    """The table (one line for each row), pictures over depth or as bars, and what stands behind the ceiling."""
    differing = [(name, key) for name, key in _DIFFERING if len({row[key] for row in rows if row["test"]}) > 1]
    if len({row["model"] for row in rows}) > 1 and ("model", "model") not in differing:
        differing.insert(0, ("model", "model"))
    said = []
    if env.get("busy"):
        said.append(f"At the start {env['busy']}.")
    if not complete:
        said.append("Incomplete: stopped before all was measured.")
    return Report("Speed", tuple(said), (_table(rows, differing, env),), tuple(_pictures(rows, differing)))


def _table(rows: Sequence[Row], differing: Sequence[tuple[str, str]], env: Mapping[str, Any]) -> Table:
    first_token, status = any(r["test"] == "ttft" for r in rows), any(r["status"] != "ok" for r in rows)
    columns = [
        *(("model",) if ("model", "model") in differing else ()),
        "backend",
        "test",
        *(name for name, _key in _ALWAYS),
        *(name for name, key in differing if key != "model"),
        "tok/s",
        "±",
        "% of ceiling",
        "peak MiB",
        *(("first token s",) if first_token else ()),
        "rope",
        *(("status",) if status else ()),
    ]
    shown = []
    for row in rows:
        cells: list[Cell] = [row["model"]] if ("model", "model") in differing else []
        cells += [row["backend"], name_of(row), *(row[key] for _name, key in _ALWAYS)]
        cells += [_word(row, key) for _name, key in differing if key != "model"]
        several = row["samples_ns"] is not None and len(row["samples_ns"]) > 1
        cells += [row["tok_per_s"], row["spread"]["stddev"] if several else None]
        cells += [None if row["fraction"] is None else round(100 * row["fraction"])]
        cells += [None if row["peak_rss_bytes"] is None else round(row["peak_rss_bytes"] / 2**20)]
        if first_token:
            cells.append(row["seconds"] if row["test"] == "ttft" else None)
        cells.append(_rope(row))
        if status:
            cells.append(row["status"])
        shown.append(tuple(cells))
    return Table("", tuple(columns), tuple(shown), note=_behind(env), digits=4)


def _behind(env: Mapping[str, Any]) -> str:
    read = env.get("read_bytes_per_s") or {}
    speeds = ", ".join(f"{speed / 1e9:.1f} GB/s with {n} thread{'s' * (n > 1)}" for n, speed in sorted(read.items()))
    return f"ceiling of tg: memory reads {speeds}; each token needs weights and cache once" if speeds else ""


def _word(row: Row, key: str) -> Cell:
    value: Cell = row[key]
    if key == "model":
        return Path(str(value)).name
    return _FLASH_WORDS.get(value, value) if key == "flash_attn" and isinstance(value, int) else value


def _rope(row: Row) -> str | None:
    check = row["rope_check"]
    if check is None:
        return None
    return check["status"] if check["value"] is None else f"{check['status']} {check['value']:.2g}"


def _pictures(rows: Sequence[Row], differing: Sequence[tuple[str, str]]) -> Iterable[Picture]:
    """Over depth where there are several, else bars; what is read and what is generated differ in scale."""
    fine = [row for row in rows if row["status"] == "ok"]
    keys = [key for _name, key in (*differing, *_ALWAYS) if len({row[key] for row in fine}) > 1]
    for title, tests in _PICTURES:
        those = [row for row in fine if row["test"] in tests]
        depths = {row["depth"] for row in those if row["test"] != "ttft"}
        if len(depths) > 1:
            yield Chart(title, "depth (tokens in the cache)", "tokens per second", tuple(_lines(those, keys)))
        elif those:
            bars = tuple(
                Line(_label(row, keys, with_depth=True), (0.0,), (row["tok_per_s"],), (row["spread"]["stddev"],))
                for row in those
            )
            yield Bars(title, "", "tokens per second", bars, bounds=tuple(row["ceiling_tok_per_s"] for row in those))


def _lines(rows: Sequence[Row], keys: Sequence[str]) -> Iterable[Line]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: int(row["depth"])):
        groups.setdefault(_label(row, keys), []).append(row)
    for label, group in groups.items():
        x = tuple(float(row["depth"]) for row in group)
        yield Line(label, x, tuple(row["tok_per_s"] for row in group), tuple(row["spread"]["stddev"] for row in group))
    ceilings: dict[tuple[tuple[float, float], ...], str] = {}
    for label, group in groups.items():
        points = tuple((float(r["depth"]), r["ceiling_tok_per_s"]) for r in group if r["ceiling_tok_per_s"])
        if len(points) > 1:  # that of tg and of tg+s is one
            ceilings.setdefault(points, f"ceiling of {label}")
    for points, label in ceilings.items():
        yield Bound(label, tuple(x for x, _y in points), tuple(y for _x, y in points))


def _label(row: Row, keys: Sequence[str], with_depth: bool = False) -> str:
    words = [f"{row[key]} threads" if key == "n_threads" else str(_word(row, key)) for key in keys]
    name = name_of(row if with_depth else row | {"depth": 0})
    return " ".join([row["backend"], *words, name])


def write_csv(rows: Sequence[Row], path: Path, force: bool) -> None:
    """All rows, a column for each key; lists and objects as JSON. Whole or not at all: YarnEdgeError."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for row in rows:
        writer.writerow([_field(row.get(key)) for key in keys])
    with partial_file(path) as partial:
        partial.write_bytes(text.getvalue().encode("utf-8", errors="surrogateescape"))
        publish(partial, path, force)
    note(f"{path}: the rows")


def _field(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value
