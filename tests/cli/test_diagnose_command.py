"""`cmrm diagnose`: JSON, tables, report, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.commands import json_of, output, refused, run
from cmrm.cli import options
from cmrm.measure.schema import read_results
from cmrm.prompts.conditions import CORRUPTED


@pytest.fixture
def command(checkpoint: str, data: Path) -> tuple[Any, ...]:
    return ("diagnose", checkpoint, "--data", data, "--max-new-tokens", 2)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "text.csv").write_text("query\nhello\nwhat now\n")
    return tmp_path / "text.csv"


def test_json_and_file_are_the_same(
    command: tuple[Any, ...], artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "d.json"
    results = json_of(*command, "--corruptions", "all", "--shift", artifact, "--out", out, "--json")
    assert results == read_results(out)
    conditions = {cell["condition"] for cell in results["cells"]}
    assert conditions == {"original", "noise", "caption", "query", *(c.value for c in CORRUPTED)}
    assert [c["condition"] for c in results["cells"] if c["defense"] == "cmrm_dataset"] == [
        "original"
    ]


def test_tables(command: tuple[Any, ...], artifact: Path) -> None:
    text = output(*command, "--shift", artifact, "--corruptions", "blur", "--judges", "small")
    for words in (
        "original image + CMRM dataset level",
        "unsafe rate",
        "distance to query",
        "ratio of norms",
    ):
        assert words in text


def test_alpha_replaces_the_recommended_one(command: tuple[Any, ...], artifact: Path) -> None:
    results = json_of(*command, "--shift", artifact, "--alpha", 0.25, "--json")
    assert results["settings"]["steering"]["alpha"] == 0.25


def test_report_writes_a_page_and_keeps_replies(
    command: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json_of(*command, "--report", tmp_path / "r", "--json")
    assert read_results(tmp_path / "r" / "results.json") == results
    assert "What an image costs" in (tmp_path / "r" / "report.html").read_text()

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a reply was generated again")

    monkeypatch.setattr("cmrm.engines.transformers.TransformersEngine.answer", never)
    assert json_of(*command, "--report", tmp_path / "r", "--json") == results


def test_several_judges(command: tuple[Any, ...]) -> None:
    results = json_of(*command, "--judges", "keyword,regression", "--json")
    assert results["judges"] == ["keyword", "regression"]
    assert "unknown judge 'nobody'" in refused(*command, "--judges", "nobody")
    assert "--judges names nothing" in refused(*command, "--judges", " ,")


def test_conditions_that_were_not_measured_are_named(checkpoint: str, texts: Path) -> None:
    text = ("diagnose", checkpoint, "--data", texts, "--max-new-tokens", 2)
    shown = output(*text, "--label", "harmful")
    assert "original: not measured, 2 of 2 samples have no image" in shown
    assert "are about images" in refused(*text, "--corruptions", "blur", "--label", "benign")


def test_a_set_without_labels_is_refused_before_the_model_is_loaded(
    texts: Path, tmp_path: Path
) -> None:
    command = ("diagnose", tmp_path / "no model", "--data", texts)
    assert "no sample is labelled harmful or benign" in refused(*command)
    assert "label is 'bad'" in refused(*command, "--label", "bad")


def test_unlabelled_samples_are_named(checkpoint: str, tmp_path: Path) -> None:
    (tmp_path / "mixed.csv").write_text(
        "query,label\nhello,harmful\nwhat now,strange\nand then,safe\n"
    )
    text = output("diagnose", checkpoint, "--data", tmp_path / "mixed.csv", "--max-new-tokens", 2)
    assert "1 of 3 samples are labelled neither harmful nor benign" in text


def test_alpha_without_an_artifact(command: tuple[Any, ...]) -> None:
    assert "--alpha goes with --shift" in refused(*command, "--alpha", 1)


def test_results_that_cannot_be_written(command: tuple[Any, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot write" in refused(*command, "--out", tmp_path / "file" / "d.json")
    inside = tmp_path / "folder" / "inside"
    inside.parent.mkdir()
    inside.write_text("x")
    assert "is a folder" in refused(*command, "--out", inside.parent)
    assert inside.read_text() == "x"
    assert "cannot be used as a store" in refused(*command, "--report", tmp_path / "file" / "r")


def test_a_missing_library_is_one_line(
    command: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(options, "RESULTS", ("scipy", "no_such_library"))
    assert refused(*command) == (
        "`cmrm diagnose` needs no_such_library; install it with: pip install 'cmrm[eval]'"
    )
    monkeypatch.setattr(options, "RESULTS", ("scipy",))
    monkeypatch.setattr(options, "REPORT", ("no_such_library",))
    assert "`cmrm diagnose --report` needs" in refused(*command, "--report", tmp_path)
    assert run(*command).exit_code == 0


def test_the_document_is_json_alone(command: tuple[Any, ...], tmp_path: Path) -> None:
    result = run(*command, "--json", "--report", tmp_path / "r")
    assert json.loads(result.stdout)["kind"] == "diagnosis"
