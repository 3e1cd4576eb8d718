"""The built-in page in the system's headless Chromium. Without a browser the tests are skipped, but in CI (CI=true) they fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.scripted_server import scripted_server
from support.serving import Server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing but the page: root may not use the sandbox, and the browser is not to call home.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


class Visit:
    """An open page, the hosts it asked, and its console messages."""

    def __init__(self, browser: Any, port: int, width: int = 1280) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 720})
        self.hosts: set[str] = set()
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.hosts.add(urlsplit(request.url).netloc))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.route("**/v1/chat/completions", _greedy)
        self.page.goto(f"http://127.0.0.1:{port}/")

    def ask(self, question: str) -> str:
        """The answer's text, once it is whole."""
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        self.page.wait_for_selector("#stop:visible")
        self.page.wait_for_selector("#send:visible", timeout=120_000)
        return str(self.page.locator(".answer").last.inner_text())


def _greedy(route: Any) -> None:
    """The same answers each time: a sampled one can end before anybody stops it."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "temperature": 0, "max_tokens": 200}))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        message = "no browser: install chromium (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.terminate()
    started.process.communicate(timeout=20)
    assert started.process.returncode == 0


def test_a_document_a_question_and_an_answer(browser: Any, server: Server, tmp_path: Path) -> None:
    visit = Visit(browser, server.port)
    visit.page.wait_for_selector("#tokens:has-text('0 of 1024 tokens')")
    story = tmp_path / "story <b>.txt"
    story.write_text("A fox met a crow. The crow had cheese. <img src=http://example.invalid/x.png>")
    visit.page.set_input_files("#file", str(story))
    visit.page.wait_for_selector(".document:has-text('story <b>.txt')")
    assert visit.ask("Who had cheese?")
    assert visit.page.locator(".numbers").last.inner_text().split(",")[0].endswith("tokens")
    used = int(visit.page.inner_text("#tokens").split()[0])
    assert used > 20
    assert visit.page.locator("#talk img, #talk b").count() == 0  # a dropped file is text, never markup
    visit.page.fill("#question", "Write a very long story about the fox.")
    visit.page.press("#question", "Enter")
    visit.page.wait_for_selector(".numbers:has-text('pieces…')", timeout=120_000)  # it appears as it is generated
    visit.page.click("#stop")
    visit.page.wait_for_selector(".numbers:has-text('stopped')")
    assert visit.ask("And who met it?")
    assert int(visit.page.inner_text("#tokens").split()[0]) > used
    visit.page.click("#reset")
    assert visit.page.locator(".turn").count() == 0
    assert visit.page.locator(".tab").count() == 2
    assert visit.hosts == {f"127.0.0.1:{server.port}"}
    assert visit.complaints == []


def test_what_cannot_be_is_said_on_the_page(browser: Any, server: Server, tmp_path: Path) -> None:
    visit = Visit(browser, server.port)
    visit.page.wait_for_selector("#tokens:has-text('0 of 1024 tokens')")
    for name, content, message in (
        ("long.txt", b"word " * 3000, "long.txt has 3"),
        ("picture.png", b"\x89PNG\r\n\xff\x00", "picture.png is not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        visit.page.set_input_files("#file", str(tmp_path / name))
        visit.page.wait_for_selector(f".error:has-text('{message}')")
    assert visit.page.locator(".document").count() == 0
    visit.page.fill("#question", "word " * 2000)
    visit.page.press("#question", "Enter")
    visit.page.wait_for_selector(".error >> nth=2")
    assert visit.page.input_value("#question").startswith("word word")  # what was typed is not lost
    assert visit.page.locator(".user, .answer").count() == 0  # and will not be there twice


def test_several_documents_from_the_file_picker(browser: Any, server: Server, tmp_path: Path) -> None:
    visit = Visit(browser, server.port)
    visit.page.wait_for_selector("#tokens:has-text('0 of 1024 tokens')")
    for name in "one.txt", "two.txt":
        (tmp_path / name).write_text(name)
    visit.page.set_input_files("#file", [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")])
    visit.page.wait_for_selector(".document:has-text('two.txt')", timeout=5_000)
    assert visit.page.locator(".document").count() == 2


def test_nothing_is_out_of_view_on_a_narrow_screen(browser: Any, server: Server) -> None:
    """The box for questions has the whole width, and its placeholder fits; of more tabs than fit, the one that is shown is seen."""
    page = Visit(browser, server.port, width=390).page
    page.wait_for_selector("#load:has-text('0 waiting')")
    overflow = page.locator("#question").evaluate("box => box.scrollHeight - box.clientHeight")
    assert overflow <= 0
    for _ in range(6):
        page.click("#reset")
    tab = page.locator(".tab.shown").bounding_box()
    assert tab["x"] >= 0
    assert tab["x"] + tab["width"] <= 390
    page.click(".tab >> nth=0 >> button >> nth=0")
    assert page.locator(".tab.shown").bounding_box()["x"] >= 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_who_reads_further_up_is_left_there(browser: Any, server: Server) -> None:
    """Otherwise the end of an answer stays in view while it grows."""
    page = Visit(browser, server.port, width=390).page
    page.wait_for_selector("#load:has-text('0 waiting')")
    page.set_viewport_size({"width": 390, "height": 420})
    page.fill("#question", "Write a very long story about a fox.")
    page.press("#question", "Enter")
    page.locator("#talk").evaluate(
        """talk => new Promise((done) => {
          const look = () => {
            if (talk.scrollTop < 50) requestAnimationFrame(look);
            else { talk.scrollTop = 0; done(); }
          };
          look();
        })"""
    )
    page.wait_for_selector("#send:visible", timeout=120_000)
    assert page.locator("#talk").evaluate("talk => talk.scrollTop") == 0


def test_a_wrong_key_is_said(browser: Any, tmp_path: Path) -> None:
    with scripted_server(tmp_path, key="right") as made:
        page = Visit(browser, made.port).page
        page.wait_for_selector("#key[open]")
        assert page.inner_text("#key-problem") == ""
        for typed in "wrong", "right":
            page.fill("#key-value", typed)
            page.press("#key-value", "Enter")
            if typed == "wrong":
                page.wait_for_selector("#key-problem:has-text('the API key is missing or wrong')", timeout=5_000)
        page.wait_for_selector("#load:has-text('waiting')")
        assert page.locator("#key[open]").count() == 0


def test_two_conversations_at_once(browser: Any, server: Server) -> None:
    """Both are asked before either is answered; one is stopped, the other goes on; each keeps what is typed in it."""
    visit = Visit(browser, server.port)
    page = visit.page
    page.wait_for_selector("#load:has-text('0 waiting')")
    page.fill("#question", "Write a very long story about a fox.")
    page.press("#question", "Enter")
    page.click("#reset")
    page.fill("#question", "Name a color.")
    page.press("#question", "Enter")
    page.wait_for_selector("#stop:visible")
    page.fill("#question", "half a thou")
    assert page.locator(".tab.busy").count() == 2
    page.click(".tab >> nth=0 >> button >> nth=0")
    assert page.input_value("#question") == ""
    page.wait_for_selector(".numbers:has-text('pieces…')", timeout=120_000)
    page.click("#stop")
    page.wait_for_selector(".numbers:has-text('stopped')")
    assert page.locator(".user").inner_text() == "Write a very long story about a fox."
    page.click(".tab >> nth=1 >> button >> nth=0")
    page.wait_for_selector("#send:visible", timeout=120_000)
    assert page.locator(".user").inner_text() == "Name a color."
    assert page.locator(".answer").inner_text()
    assert page.input_value("#question") == "half a thou"
    page.click(".tab >> nth=1 >> button >> nth=1")
    assert page.locator(".tab").count() == 1
    assert visit.complaints == []


def test_a_call_of_a_tool(browser: Any, tmp_path: Path) -> None:
    """Its arguments are shown as text; the result that is typed goes back with the call."""
    with scripted_server(tmp_path) as made:
        visit = Visit(browser, made.port)
        page = visit.page
        page.wait_for_selector("#load:has-text('3 of 3 running, 0 waiting')")
        page.click("summary:has-text('Tools')")
        page.fill("#tools", "[{")
        visit.page.fill("#question", "Rain?")
        visit.page.press("#question", "Enter")
        page.wait_for_selector(".error:has-text('Tools: ')")
        page.fill("#tools", '[{"type": "function", "function": {"name": "weather"}}]')
        page.set_viewport_size({"width": 1280, "height": 670})  # the call fits, the box for its result does not
        made.worker.says('<tool_call>\n{"name": "weather", "arguments": {"city": ', '"<b>Rome"}}\n</tool_call>')
        visit.page.press("#question", "Enter")
        page.wait_for_selector(".call textarea")
        assert page.locator("#talk").evaluate("talk => talk.scrollHeight - talk.scrollTop - talk.clientHeight") < 1
        assert json.loads(page.inner_text(".call .arguments")) == {"city": "<b>Rome"}
        assert page.inner_text(".call .name") == "weather"
        visit.page.fill("#question", "And now?")
        visit.page.press("#question", "Enter")
        page.wait_for_selector(".error:has-text('Type the results of the calls first.')")
        made.worker.says("It is raining.")
        page.fill(".call textarea", "Rain <i>all day")
        page.click(".call .results")
        page.wait_for_selector(".answer:has-text('It is raining.')")
        assert page.locator(".error:has-text('Type the results')").count() == 0
        model = made.worker.model
        prompt = b"".join(map(model.token_bytes, made.worker.asked[0].tokens)).decode()
        assert "<u>tool\nRain <i>all day</s>" in prompt
        assert page.locator("#talk b, #talk i").count() == 0
        assert visit.complaints == []
