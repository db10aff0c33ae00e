"""The playground in a real browser: load, upload, ask, move alpha, stop, a phone's width."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the playground needs the extra `ui`")
pytest.importorskip("playwright", reason="browser tests need playwright")
from playwright.sync_api import Page, expect

from cmrm.engines.base import Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.model.vlm import VLM
from cmrm.ui.app import CSS, build
from cmrm.ui.session import Session
from ui.sessions import session

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


@contextmanager
def running(shown: Session) -> Iterator[str]:
    """The playground's address while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    page = build(shown, "tiny").queue()
    page.launch(
        server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, css=CSS
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close()


class Slow(TransformersEngine):
    """An engine that pauses before each piece, as a real model does, and counts them."""

    pause = 0.03
    """Seconds."""
    pieces = 0

    def stream(self, *arguments: Any, **options: Any) -> Generator[str | Reply, None, None]:
        for piece in super().stream(*arguments, **options):
            self.pieces += 1
            time.sleep(self.pause)
            yield piece


def slow_session(vlm: VLM, pause: float = Slow.pause) -> Session:
    shown = session(vlm, max_new_tokens=40)
    shown.engine = engine = Slow(shown.engine.vlm)
    engine.pause = pause
    return shown


@pytest.fixture(scope="module")
def address(vlm: VLM) -> Iterator[str]:
    with running(slow_session(vlm)) as address:
        yield address


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
    expect(seen.page.locator("#ask")).to_be_disabled(timeout=30_000)
    expect(seen.page.locator("#verdict-3")).not_to_contain_text(WORDS, timeout=30_000)


def judged(seen: Open, k: int) -> None:
    """Wait until a column's verdict stands there, and Ask can be pressed again."""
    expect(seen.page.locator(f"#verdict-{k}")).to_contain_text(WORDS, timeout=60_000)
    expect(seen.page.locator("#ask")).to_be_enabled(timeout=60_000)


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
    chosen = seen.page.get_by_role("radio", name="fill")
    assert chosen.is_checked(), "the third column begins with what the artifact recommends"
    seen.page.get_by_role("radio", name="add").check()
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
    judged(seen, 0)
    assert seen.answer(0) != first
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


def test_stop_ends_the_model(browser: Any, vlm: VLM, picture: Path) -> None:
    shown = slow_session(vlm, pause=0.3)
    engine = shown.engine
    assert isinstance(engine, Slow)
    with running(shown) as address:
        seen = visit(browser, address)
        ask(seen, "How do I open it?", picture)
        expect(seen.page.locator("#answer-0 textarea")).not_to_have_value("", timeout=30_000)
        seen.page.locator("#stop").click()
        expect(seen.page.locator("#says")).to_contain_text("Stopped.", timeout=30_000)
        expect(seen.page.locator("#ask")).to_be_enabled(timeout=30_000)
        verdicts = [seen.page.locator(f"#verdict-{k}").inner_text().strip() for k in range(4)]
        column = verdicts.index("stopped")
        assert verdicts[column + 1 :] == [""] * (3 - column)
        assert [seen.answer(k) for k in range(column + 1, 4)] == [""] * (3 - column)
        pieces = engine.pieces
        seen.page.wait_for_timeout(1500)
        assert engine.pieces == pieces, "the model still runs"
        engine.pause = Slow.pause
        ask(seen, "What is the sea?")
        judged(seen, 3)
        assert seen.errors == []
        seen.page.close()


def test_an_empty_query_says_so(browser: Any, address: str) -> None:
    seen = visit(browser, address)
    seen.page.locator("#query textarea").fill(" ")
    seen.page.locator("#ask").click()
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
