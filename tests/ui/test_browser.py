"""The playground in a real browser: load, upload, ask, move alpha, stop, a phone's width."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the playground needs the extra `ui`")
pytest.importorskip("playwright", reason="browser tests need playwright")
from playwright.sync_api import Page, expect, sync_playwright

from cmrm.model.vlm import VLM
from cmrm.ui.app import CSS, build
from ui.sessions import session

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium (apt install chromium)"
)
ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
WORDS = re.compile("refused|complied|unscored|unsafe|safe")
"""What verdicts begin with."""
SHOTS = os.environ.get("CMRM_SCREENSHOTS")
"""Folder for screenshots to look at."""


@dataclass
class Open:
    """A page on the running playground."""

    page: Page
    errors: list[str] = field(default_factory=list)

    def answer(self, k: int) -> str:
        return self.page.locator(f"#answer-{k} textarea").input_value()


@pytest.fixture(scope="module")
def address(vlm: VLM) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(session(vlm, max_new_tokens=40), "tiny").queue()
    page.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, css=CSS
    )
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield made
        made.close()


def visit(browser: Any, address: str, **options: Any) -> Open:
    page = browser.new_page(**options)
    seen = Open(page)
    outside = re.compile(r"fonts|cdn|Failed to load resource|ERR_|manifest", re.IGNORECASE)
    page.on(
        "console",
        lambda message: (
            seen.errors.append(message.text)
            if message.type == "error" and not outside.search(message.text)
            else None
        ),
    )
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.goto(address)
    expect(page.locator("#ask")).to_be_visible(timeout=60_000)
    return seen


def ask(seen: Open, query: str, image: Path | None = None) -> None:
    if image is not None:
        seen.page.locator("input[type=file]").first.set_input_files(str(image))
        expect(
            seen.page.get_by_label("Remove Image").or_(seen.page.locator("img[src*='file=']")).first
        ).to_be_visible(timeout=30_000)
    seen.page.locator("#query textarea").fill(query)
    seen.page.locator("#ask").click()
    expect(seen.page.locator("#verdict-3")).not_to_contain_text(WORDS, timeout=30_000)


def judged(seen: Open, k: int) -> None:
    """Wait until a column's verdict stands there."""
    expect(seen.page.locator(f"#verdict-{k}")).to_contain_text(WORDS, timeout=60_000)


def shot(seen: Open, name: str) -> None:
    if SHOTS:
        seen.page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ui") / "red.png"
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def test_ask_with_an_image_and_move_alpha(browser: Any, address: str, picture: Path) -> None:
    seen = visit(browser, address)
    ask(seen, "How do I open it?", picture)
    judged(seen, 3)
    first = [seen.answer(k) for k in range(4)]
    assert all(first)
    assert len(set(first)) > 2
    expect(seen.page.locator("#says")).to_contain_text("harm gate at layer 0", timeout=60_000)
    shot(seen, "answers")
    seen.page.locator("#clear").click()
    expect(seen.page.locator("#answer-2 textarea")).to_have_value("", timeout=30_000)
    seen.page.locator("#alpha input[type=number]").fill("0")
    seen.page.locator("#alpha input[type=number]").press("Enter")
    ask(seen, "How do I open it?", picture)
    judged(seen, 3)
    assert seen.answer(2) == seen.answer(1) == first[1], "alpha 0 is the untouched model"
    assert seen.answer(2) != first[2]
    assert seen.errors == []


def test_text_alone_and_a_second_turn(browser: Any, address: str) -> None:
    seen = visit(browser, address)
    ask(seen, "What is the sea?")
    expect(seen.page.locator("#answer-1 textarea")).to_have_value(
        "(no image: as text only)", timeout=60_000
    )
    judged(seen, 0)
    first = seen.answer(0)
    ask(seen, "And the sky?")
    expect(seen.page.locator("#answer-0 textarea")).not_to_have_value(first, timeout=60_000)
    assert seen.errors == []


def test_a_second_turn_with_the_same_image(browser: Any, address: str, picture: Path) -> None:
    """Its answer depends on the first turn; a new conversation gives another one."""
    seen = visit(browser, address)
    ask(seen, "How do I open it?", picture)
    judged(seen, 3)
    first = seen.answer(1)
    ask(seen, "What is it made of?")
    expect(seen.page.locator("#answer-1 textarea")).not_to_have_value(first, timeout=60_000)
    judged(seen, 3)
    expect(seen.page.locator("#says")).to_contain_text("harm gate", timeout=60_000)
    second = seen.answer(1)
    seen.page.locator("#clear").click()
    expect(seen.page.locator("#answer-1 textarea")).to_have_value("", timeout=30_000)
    ask(seen, "What is it made of?", picture)
    judged(seen, 3)
    assert seen.answer(1) != second
    assert seen.errors == []


def test_an_empty_query_says_so(browser: Any, address: str) -> None:
    seen = visit(browser, address)
    ask(seen, " ")
    expect(seen.page.locator("#says")).to_contain_text("type a query", timeout=30_000)
    assert seen.errors == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("phone", {"viewport": {"width": 390, "height": 844}}),
        ("dark", {"color_scheme": "dark"}),
    ],
)
def test_other_screens(
    browser: Any, address: str, picture: Path, name: str, options: dict[str, Any]
) -> None:
    seen = visit(browser, address, **options)
    ask(seen, "How do I open it?", picture)
    judged(seen, 3)
    shot(seen, name)
    wide = seen.page.evaluate("document.documentElement.scrollWidth")
    size = seen.page.viewport_size
    assert size is not None
    assert wide <= size["width"] + 1
    assert seen.errors == []
