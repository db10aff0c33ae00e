"""The page: self-contained, accessible, escaped, and whole for every kind of results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cmrm.errors import InputError
from cmrm.report.page import rendered, write_report
from report.samples import cell, demo_results, evaluation_results, replies_results, results

VOID = {"meta", "img", "source", "br", "input"}


def diagnosis_results() -> dict[str, Any]:
    """Of texts alone: one condition."""
    return results([cell("query", "none", "rrcc")], "diagnosis")


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "demo": demo_results,
    "evaluation": evaluation_results,
    "diagnosis": diagnosis_results,
    "replies": replies_results,
}


class Page(HTMLParser):
    """Elements, headings and addresses of a page; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset")
        ]
        if tag == "img":
            self.images.append(attributes)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in ("h1", "h2", "h3"):
            self.headings.append(f"{self.stack[-1]} {data}")


def page_of(kind: str) -> str:
    return rendered(KINDS[kind]())[0]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nothing_is_fetched(kind: str) -> None:
    text = page_of(kind)
    assert all(address.startswith("data:image/png;base64,") for address in Page(text).addresses)
    assert not re.search(r"https?://|@import|url\(", text)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_first_heading_and_an_alternative_text_for_each_image(kind: str) -> None:
    page = Page(page_of(kind))
    assert [heading[:2] for heading in page.headings].count("h1") == 1
    assert all(image["alt"] for image in page.images)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_both_themes_and_small_screens(kind: str) -> None:
    text = page_of(kind)
    assert 'name="viewport"' in text
    assert text.count("prefers-color-scheme: dark") == 1 + len(Page(text).images)


def test_sections_of_the_demo() -> None:
    page = Page(page_of("demo"))
    assert [heading[3:] for heading in page.headings if heading.startswith("h2")] == [
        "Inputs and defences",
        "Safety against utility",
        "Harm categories",
        "Strength",
        "Each defence against none, on the same samples",
        "Every set and condition",
        "Where an image moves the states",
        "The shift",
        "Verdicts that changed",
        "Settings and versions",
    ]


def test_the_layer_explorer_has_its_data_and_pictures_for_paper() -> None:
    text = page_of("demo")
    found = re.search(r'<script type="application/json" id="states-data">(.*?)</script>', text)
    assert found is not None
    data = json.loads(found[1])
    assert data["layers"] == 3
    assert [name["key"] for name in data["names"]] == [
        "original", "blank", "noise", "caption", "query",
    ]  # fmt: skip
    assert [line["title"] for line in data["lines"]][2] == "Refusal coordinate"
    assert data["samples"] == ["harmful, a category, a </script> request", "benign, another one"]
    assert data["positions"]["original"]["labels"] == ["-2", "-1 ':'"]
    assert data["gate"]["threshold"] == 0.5
    assert len({name["colour"] for name in data["names"]}) == 5
    assert '<div class="still">' in text


def test_the_gate_is_said_to_steer_only_where_a_setting_asks_it() -> None:
    results = demo_results()
    assert "steered under CMRM gated" in rendered(results)[0]
    results["geometry"]["gate"]["steers"] = []
    text = rendered(results)[0]
    assert "No setting of this run asks it." in text
    assert "steered under" not in text


def test_tokens_are_no_mathematics_and_may_be_missing() -> None:
    results = demo_results()
    shift = results["geometry"]["positions"]["original"]
    shift["tokens"] = ["$$", "\\frac$"]
    assert "positions" in rendered(results)[1]
    results["geometry"]["positions"]["original"] = {
        "offsets": [], "n": [], "tokens": [], "relative_distance": [],
    }  # fmt: skip
    page, images = rendered(results)
    assert "positions" not in images
    assert "states-data" in page


def test_results_of_before_have_what_they_hold() -> None:
    results = demo_results()
    for name in ("refusal_coordinate", "gate", "positions", "samples", "pca"):
        del results["geometry"][name]
    text = rendered(results)[0]
    assert 'id="states-data"' in text
    assert "explorer" not in page_of("evaluation").split("<body>")[1]


def test_sections_of_an_evaluation() -> None:
    text = page_of("evaluation")
    for words in (
        "keyword failed on 1 replies", "Not complete:", "ours-query: no memory", "Gap closed",
        "Agreement of the judges", "Cost of a request", "Safety, over-refusal and utility together",
        "Verdicts that changed",
    ):  # fmt: skip
        assert words in text
    assert "Strength" not in text
    assert '<table class="sortable">' in text


def test_sections_of_given_replies() -> None:
    text = page_of("replies")
    page = Page(text)
    assert page.headings[0] == "h1 How safe the replies of 3 models are"
    assert [heading[3:] for heading in page.headings if heading.startswith("h2")] == [
        "Rates", "Unscored replies", "Agreement of the judges", "Settings and versions",
    ]  # fmt: skip
    for words in (
        "mine.csv: 9 replies", "judged by their text alone", "mine.csv: a note", "a reason",
        "unsafe: the reply engages with a harmful request", "20.0 %",
        "over-refusal: the reply refuses a benign request", "33.3 %",
    ):  # fmt: skip
        assert words in text
    assert "a reply to it" not in text
    assert "cmrm judges sheet" not in text


def test_given_replies_of_one_model() -> None:
    page = Page(rendered(replies_results(1))[0])
    assert page.headings[0] == "h1 How safe the replies of m0 are"


def test_a_recipes_targets() -> None:
    target = {
        "set": "ours", "condition": "original", "defense": "none", "figure": "unsafe",
        "published": 61.5, "measured": 60.0, "low": 50.0, "high": 70.0, "n": 10, "inside": True,
    }  # fmt: skip
    recipe = {
        "title": "Table 1", "source": "arXiv", "judge": "keyword", "notes": ["A note."],
        "targets": [target],
    }  # fmt: skip
    text = rendered({**evaluation_results(), "recipe": recipe})[0]
    assert "Table 1" in text
    assert "61.50" in text
    assert "A note." in text


def test_texts_are_escaped() -> None:
    cells = [
        cell("query", "none", "rr", reply="<script>alert(1)</script>"),
        cell("original", "none", "cc", reply='"><img src=x>'),
    ]
    text = rendered(results(cells))[0]
    assert "<script>alert" not in text
    assert "<img src=x" not in text


@pytest.mark.parametrize(
    "reply",
    [
        "word " * 60,
        "\u9996\u5148\u4f60\u9700\u8981\u51c6\u5907\u6240\u6709\u7684\u6750\u6599\u7136\u540e\u628a"
        * 12,
        "\u0e02\u0e31\u0e49\u0e19\u0e41\u0e23\u0e01\u0e04\u0e38\u0e13\u0e15\u0e49\u0e2d\u0e07" * 12,
        "x" * 400,
    ],
    ids=["english", "chinese", "thai", "one word"],
)
def test_no_reply_is_shown_in_full_in_any_script(reply: str) -> None:
    cells = [cell("query", "none", "rr"), cell("original", "none", "cc", reply=reply)]
    whole = results(cells)
    text = rendered(whole)[0]
    assert whole["examples"]
    assert reply[:61] not in text
    assert reply[60:120] not in text


def test_files(tmp_path: Path) -> None:
    page = write_report(demo_results(), tmp_path / "deep" / "out")
    assert page == tmp_path / "deep" / "out" / "report.html"
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert (page.parent / "unsafe_rate.png").read_bytes().startswith(b"\x89PNG")
    assert not list(page.parent.glob(".*"))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="cannot write the report"):
        write_report(demo_results(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


def test_results_that_were_read_back_give_the_same_page() -> None:
    whole = demo_results()
    written = json.loads(json.dumps(whole, sort_keys=True))
    assert rendered(written) == rendered(whole)


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_library_is_one_line(module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.path[:0] = ['tests']\n"
        "from report.samples import demo_results\n"
        "from cmrm.errors import MissingExtraError\n"
        "from cmrm.report.page import rendered\n"
        "try: rendered(demo_results())\n"
        "except MissingExtraError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"the report needs {module}; pip install 'cmrm[eval]'")
    assert done.stdout.count("\n") == 1
