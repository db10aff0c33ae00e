"""Two runs on one page: paired where both have replies, by their rates else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the page needs the extra `eval`")

from cmrm.errors import InputError
from cmrm.measure.between import Run, compared_runs, differing_facts
from cmrm.measure.outcomes import Cell
from cmrm.measure.rates import paired
from cmrm.report.compare import comparison, read_run, write_comparison
from report.samples import cell, questions, results


def run(name: str, cells: list[Cell], *, replies: bool = True, **more: Any) -> Run:
    return Run(name, results(cells, "evaluation", **more), tuple(cells) if replies else ())


LEFT = [cell("original", "none", "ccccccrr", "rccc"), questions("none", 3, 8)]
RIGHT = [cell("original", "none", "rrrrccrr", "rrcc"), questions("none", 6, 8)]


def by_figure(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["figure"]: row for row in rows}


def test_the_same_samples_are_paired() -> None:
    rows = by_figure(compared_runs(run("a", LEFT), run("b", RIGHT)))
    assert set(rows) == {"unsafe", "over_refusal", "accuracy"}
    unsafe = rows["unsafe"]
    assert unsafe["paired"]
    assert unsafe["difference"] == pytest.approx(-0.5)
    assert (unsafe["only_left"], unsafe["only_right"], unsafe["n"]) == (4, 0, 8)
    oracle = paired([True] * 6 + [False] * 2, [False] * 4 + [True] * 2 + [False] * 2)
    assert oracle is not None
    assert (unsafe["low"], unsafe["high"]) == (oracle.low, oracle.high)
    assert unsafe["p_value"] == pytest.approx(0.125), "four changes, all one way"
    assert rows["accuracy"]["difference"] == pytest.approx(3 / 8)
    assert all(row["p_holm"] >= row["p_value"] for row in rows.values())


def test_other_requests_under_the_same_ids_are_not_paired_with_them() -> None:
    other = [
        replace(
            RIGHT[0],
            outcomes={
                key: replace(outcome, request="another" if key == "harmful-0" else outcome.request)
                for key, outcome in RIGHT[0].outcomes.items()
            },
        )
    ]
    rows = by_figure(compared_runs(run("a", LEFT), run("b", other)))
    assert rows["unsafe"]["n"] == 7


def test_rates_alone_are_compared_unpaired() -> None:
    both = compared_runs(run("a", LEFT), run("b", RIGHT))
    alone = compared_runs(run("a", LEFT, replies=False), run("b", RIGHT))
    assert [row["difference"] for row in alone] == pytest.approx(
        [row["difference"] for row in both]
    )
    unsafe = by_figure(alone)["unsafe"]
    assert not unsafe["paired"]
    assert unsafe["only_left"] is None
    assert unsafe["low"] < -0.5 < unsafe["high"]
    same = by_figure(compared_runs(run("a", LEFT, replies=False), run("a", LEFT)))["unsafe"]
    assert (same["difference"], same["p_value"]) == (0.0, 1.0)


def test_defences_of_other_names_are_matched() -> None:
    left, right = run("a", LEFT), run("b", [cell("original", "served", "rrrrrrrr")])
    with pytest.raises(InputError, match="no figure in common"):
        compared_runs(left, right)
    (row,) = compared_runs(left, right, {"none": "served"})
    assert (row["left"], row["right"], row["figure"]) == ("none", "served", "unsafe")
    for wrong in ({"nothing": "served"}, {"none": "nothing"}):
        with pytest.raises(InputError, match="has no defence 'nothing'"):
            compared_runs(left, right, wrong)


def test_what_is_not_scored_is_no_zero() -> None:
    left = run("a", [cell("original", "none", "uuuu", "rc")])
    rows = compared_runs(left, run("b", [cell("original", "none", "cccc", "rc")]))
    assert [row["figure"] for row in rows] == ["over_refusal"]


def test_what_differs_beside_the_replies_is_named() -> None:
    one, other = run("a", LEFT, seed=1), run("b", RIGHT, seed=2)
    facts = {name: (a, b) for name, a, b in differing_facts(one, other)}
    assert facts["seed"] == (1, 2)
    assert differing_facts(one, one) == []


def test_the_page(tmp_path: Path) -> None:
    document = comparison(run("untouched", LEFT, seed=1), run("<served>", RIGHT, seed=2))
    path = write_comparison(document, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "&lt;served&gt;" in text
    assert "<served>" not in text
    assert "-50.0" in text
    assert "All comparisons are paired" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "comparison.json").read_text()) == document
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "compare_unsafe.png", "compare_over_refusal.png", "compare_accuracy.png",
    }  # fmt: skip


def test_runs_are_read_from_folders_and_files(tmp_path: Path) -> None:
    whole = results(LEFT, "demo")
    (tmp_path / "results.json").write_text(json.dumps(whole))
    for place in (tmp_path, tmp_path / "results.json"):
        made = read_run(place)
        assert made.results == whole
        assert made.cells == ()
    assert read_run(tmp_path).name == tmp_path.name
    with pytest.raises(InputError):
        read_run(tmp_path / "nothing")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError):
        read_run(tmp_path / "broken.json")
