"""The report's layer explorer in a real browser: keyboard, hover, what is shown, paper."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cmrm.report.page import write_report
from report.samples import demo_results

SHOTS = os.environ.get("CMRM_SCREENSHOTS")
"""Folder for screenshots to look at."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    return write_report(demo_results(), folder).as_uri()


def visit(browser: Any, address: str, **options: Any) -> tuple[Any, list[str]]:
    """The page, and the errors that it reports."""
    page, errors = browser.new_page(**options), []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: None if r.url == address or r.url.startswith("data:")
            else errors.append(f"asked for {r.url}"))  # fmt: skip
    page.goto(address)
    return page, errors


def test_the_layer_is_chosen_by_keyboard(browser: Any, address: str) -> None:
    page, errors = visit(browser, address)
    assert page.locator(".explorer").is_visible()
    assert not page.locator(".still").is_visible()
    slider = page.locator("#layer")
    slider.focus()
    slider.press("Home")
    rows = page.locator(".values tbody tr")
    assert rows.count() == 5
    assert rows.nth(1).inner_text().split("\t")[1] == "0.100"
    slider.press("ArrowRight")
    assert page.locator(".chosen").first.inner_text() == "1"
    assert slider.get_attribute("aria-valuetext") == "decoder layer 1"
    assert rows.nth(1).inner_text().split("\t")[1] == "0.200"
    slider.press("End")
    assert "decoder layer 2" in page.locator(".plane figcaption").inner_text()
    page.locator(".heat summary").press("Enter")
    tokens = page.locator(".tokens tr")
    assert [row.split("\t") for row in tokens.all_inner_texts()] == [
        ["token", "-2", "-1 ':'"], ["original image", "0.300", "0.600"],
    ]  # fmt: skip
    opened = page.locator(".gate figcaption").inner_text()
    assert opened.endswith("It opens for 0 of 1 (benign), 1 of 2 (harmful).")
    assert errors == []


def test_a_state_says_which_request_it_is(browser: Any, address: str) -> None:
    page, errors = visit(browser, address)
    marks = page.locator(".plane svg path")
    assert marks.count() == 10
    marks.last.hover(force=True)
    assert page.locator(".tip").inner_text() == "query alone: benign, another one"
    cell = page.locator(".heat rect").nth(5)
    cell.hover(force=True)
    assert page.locator(".tip").inner_text() == "token -1 ':', layer 2: 0.600 (10 samples)"
    cell.click(force=True)
    assert page.locator(".chosen").first.inner_text() == "2"
    readings = page.locator(".gate svg path")
    readings.first.hover(force=True)
    assert page.locator(".tip").inner_text() == "benign: 0.100, closed"
    readings.nth(1).hover(force=True)
    assert page.locator(".tip").inner_text() == "harmful: 0.900, open"
    assert errors == []


def test_conditions_are_switched_off_and_on(browser: Any, address: str) -> None:
    page, errors = visit(browser, address)
    button = page.locator(".keys button").first
    lines = page.locator(".line").first.locator("path[stroke]")
    assert lines.count() == 5
    button.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert lines.count() == 4
    assert page.locator(".plane svg path").count() == 8
    for other in page.locator(".keys button").all()[1:]:
        other.click()
    assert lines.count() == 0
    button.press("Enter")
    assert lines.count() == 1
    assert errors == []


def test_on_paper_there_are_pictures(browser: Any, address: str) -> None:
    page, errors = visit(browser, address)
    page.emulate_media(media="print")
    assert not page.locator(".explorer").is_visible()
    assert page.locator(".still img").count() >= 4
    assert page.locator(".still img").first.is_visible()
    assert errors == []


def test_without_scripts_there_are_pictures(browser: Any, address: str) -> None:
    page, _ = visit(browser, address, java_script_enabled=False)
    assert not page.locator(".explorer").is_visible()
    assert page.locator(".still img").first.is_visible()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("report", {}),
        ("report-phone", {"viewport": {"width": 390, "height": 844}}),
        ("report-dark", {"color_scheme": "dark"}),
    ],
)
def test_other_screens(browser: Any, address: str, name: str, options: dict[str, Any]) -> None:
    page, errors = visit(browser, address, **options)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"] + 1
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"{name}.png"), full_page=True)
    assert errors == []
