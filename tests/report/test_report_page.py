"""The page of a report, read as a browser reads it: it asks for nothing, runs nothing, and hostile texts stay texts."""

from __future__ import annotations

import base64
import math
import struct
from html.parser import HTMLParser

import pytest

from yarn_edge.report.deliver import render_html
from yarn_edge.report.report import Chart, HeatMap, Line, Report, Table

NAN, INF = math.nan, math.inf
PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = '<script>alert("x")</script>&amp;\x1b[31m\u202e\n<img src=http://evil.example/x>'
CHART = Chart(
    "Perplexity by context",
    "context (tokens)",
    "perplexity",
    (
        Line("YaRN", (1024, 2048, 4096, 8192), (20.0, 19.0, NAN, 17.5), (0.5, 0.4, 0.3, 0.2)),
        Line("_plain $x^2", (1024, 2048, 4096, 8192), (18.0, 17.0, 40.0, INF)),
    ),
    log_x=True,
    log_y=True,
    marks=((2048.0, "trained context 2048"), (2500.0, "another"), (8192.0, "extended context 8192")),
)
HEAT = HeatMap("Found", "context", "depth", ("2k", "4k"), ("0 %", "50 %", "100 %"), ((1, 0.5), (0.25, NAN), (0, 0.75)))
TABLE = Table(
    "Divergence",
    ("model", "KL (nats)", "tokens"),
    (("a.gguf", 0.04123456, 12288), ("much-longer-name.gguf", 1.5, 7), ("b", None, None)),
    note="one pass",
)
REPORT = Report("Measured", ("The first sentence.", "The second."), (TABLE,), (CHART, HEAT))


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, the cells of tables, texts by the tag they stand in."""

    VOID = ("meta", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def within(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


@pytest.fixture(scope="module")
def hostile_page() -> str:
    chart = Chart(HOSTILE, HOSTILE, HOSTILE, (Line(HOSTILE, (1, 2), (1.0, 2.0)),), marks=((1.5, HOSTILE),))
    heat = HeatMap(HOSTILE, HOSTILE, HOSTILE, (HOSTILE, "x" * 10_000), (HOSTILE,), ((0.5, 1.0),))
    table = Table(HOSTILE, (HOSTILE, "n"), ((HOSTILE, 1), ("y" * 10_000, 2.5)), note=HOSTILE)
    report = Report(HOSTILE, (HOSTILE,), (table,), (chart, heat))
    return render_html(report, {HOSTILE: HOSTILE}, f"yarn-edge x \\\n'{HOSTILE}'")


def test_the_page_asks_for_nothing_and_runs_nothing(hostile_page: str) -> None:
    page = Page(hostile_page)
    assert {tag for tag, _ in page.tags} == {
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "div",
        "p",
        "figure",
        "img",
        "section",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
        "code",
    }
    for _tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name in (
                "lang",
                "charset",
                "http-equiv",
                "content",
                "name",
                "rel",
                "href",
                "class",
                "src",
                "width",
                "height",
                "alt",
                "tabindex",
                "scope",
            ), name
            if name in ("src", "href"):
                assert (value or "").startswith("data:")
    style = "".join(page.within("style"))
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_hostile_texts_stay_texts(hostile_page: str) -> None:
    page = Page(hostile_page)
    clean = "".join(c if c.isprintable() else " " for c in HOSTILE)
    for tag in ("title", "h1", "h2", "p", "th", "td"):
        assert clean in page.within(tag), tag
    for _tag, attributes in page.tags:
        assert all((value or "").isprintable() for value in attributes.values())
    assert max(len(text) for text in page.within("td")) <= 300
    (command,) = page.within("code")
    assert command.splitlines()[0] == "yarn-edge x \\"  # the command's own line breaks are kept
    assert "\x1b" not in hostile_page
    hostile_page.encode("utf-8")


def test_pictures_are_in_the_page_with_words_for_them() -> None:
    page = Page(render_html(REPORT, {}, "yarn-edge x"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for image in images:
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/png;base64"
        drawn = base64.b64decode(data, validate=True)
        assert drawn.startswith(PNG)
        width, height = struct.unpack(">II", drawn[16:24])
        assert float(str(image["width"])) / float(str(image["height"])) == pytest.approx(width / height, rel=0.01)
    assert images[0]["alt"] == (
        "Perplexity by context: perplexity over context (tokens). YaRN from 17.5 to 20; _plain $x^2 from 17 to 40"
    )
    assert images[1]["alt"] == "Found: heat map of 3 rows (depth), 2 columns (context) from 0 to 1"


def test_tables_environment_and_command_in_order() -> None:
    html = render_html(REPORT, {"CPU": "a fast one"}, "yarn-edge compare 'a b'")
    page = Page(html)
    cells = page.within("td")
    assert cells == ["a.gguf", "0.041235", "12288", "much-longer-name.gguf", "1.5000", "7", "b", "-", "-", "a fast one"]
    numbers = [attributes.get("class") for tag, attributes in page.tags if tag == "td"]
    assert numbers == [None, "number", "number"] * 3 + [None]
    assert page.within("code") == ["yarn-edge compare 'a b'"]
    places = [
        html.index(part)
        for part in ("The first sentence.", "<img", "Divergence</h2>", "a fast one", "compare &#39;a b")
    ]
    assert places == sorted(places)
