"""What stands beside every rate: judge, agreement with people, corrected rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cmrm.judges.cards import MeasuredAgreement
from cmrm.measure.correction import Correction, JudgeError
from cmrm.measure.schema import checked, read_results
from cmrm.measure.table import results_of
from cmrm.report import headline, tables
from cmrm.report.judged import correction_table, judge_line, judge_lines
from cmrm.report.page import rendered
from report.samples import cell, demo_results, evaluation_results

CORRECTED = {"rate": 0.182, "low": 0.09, "high": 0.301, "reason": None}
RATE: dict[str, Any] = {
    "rate": 0.125, "low": 0.0712, "high": 0.2093, "n": 72, "unscored": 0, "lowest": 0.125,
    "highest": 0.125, "corrected": CORRECTED,
}  # fmt: skip


def row(question: str, name: str, kappa: float | None = 0.8, **more: Any) -> MeasuredAgreement:
    values: dict[str, Any] = {
        "model": None,
        "language": None, "n": 100, "unscored": 0, "tp": 40, "fn": 5, "tn": 50, "fp": 5,
        "command": "cmrm judges agree",
    }  # fmt: skip
    return MeasuredAgreement(set=name, question=question, kappa=kappa, **values | more)  # type: ignore[arg-type]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[MeasuredAgreement, ...]]:
    """Cards in the place of the shipped ones."""
    shown: dict[str, tuple[MeasuredAgreement, ...]] = {}
    monkeypatch.setattr("cmrm.report.judged.card_of", lambda name: shown.get(name, ()))
    return shown


def person(kappa: float | None, n: int, judge: str = "keyword") -> dict[str, Any]:
    return {
        "pairs": [
            {"first": "person", "second": judge, "kappa": kappa, "n": n, "unscored": 0},
            {"first": "keyword", "second": "ensemble", "kappa": 0.1, "n": 9, "unscored": 0},
        ]
    }


def test_a_judge_without_card_and_labels(cards: object) -> None:
    assert judge_line({}, "keyword") == "keyword: agreement with people not measured"


def test_a_judge_with_a_card(cards: dict[str, tuple[MeasuredAgreement, ...]]) -> None:
    cards["small"] = (
        row("refusal", "MSTS", 0.784, unscored=3), row("refusal", "MSTS", 0.5, language="zh"),
        row("unsafe", "MSTS", None),
    )  # fmt: skip
    assert judge_line({}, "small") == (
        "small: kappa with people 0.78 on refusal (MSTS, n 100, 3 unscored), not defined on unsafe "
        "(MSTS, n 100)"
    )
    assert judge_line({}, "small", "unsafe") == (
        "small: kappa with people not defined on unsafe (MSTS, n 100)"
    )


def test_a_card_of_languages_alone(cards: dict[str, tuple[MeasuredAgreement, ...]]) -> None:
    cards["small"] = (row("refusal", "MSTS", 0.5, language="zh"),)
    assert judge_line({}, "small", "unsafe") == (
        "small: kappa with people 0.50 on refusal (MSTS, zh, n 100)"
    )


def test_labels_of_the_run_stand_behind_the_card(
    cards: dict[str, tuple[MeasuredAgreement, ...]],
) -> None:
    labelled = {"agreement": {"refusal": person(0.7, 48), "unsafe": person(0.6, 24)}}
    assert judge_line(labelled, "keyword", "unsafe") == (
        "keyword: kappa with people in this run 0.60 on unsafe (n 24)"
    )
    cards["keyword"] = (row("refusal", "XSTest", 0.9),)
    assert judge_line(labelled, "keyword", "unsafe") == (
        "keyword: kappa with people 0.90 on refusal (XSTest, n 100); in this run 0.60 on unsafe "
        "(n 24)"
    )
    assert judge_lines({**labelled, "judges": ["other"]}) == [
        "other: agreement with people not measured"
    ]


def test_the_corrected_rate_stands_behind_the_raw_one() -> None:
    assert tables.rate_text(RATE) == "12.5 % [7.1, 20.9]; corrected 18.2 % [9.0, 30.1]"
    assert tables.short_rate(RATE) == "12.5 [7-21]; corrected 18.2 [9-30]"
    missing = {**RATE, "corrected": {**CORRECTED, "rate": None, "reason": "too few"}}
    assert tables.rate_text(missing) == "12.5 % [7.1, 20.9]"
    assert tables.short_rate(missing) == "12.5 [7-21]"


def corrected_results() -> dict[str, Any]:
    """Those of the demo, with labels of another source."""
    error = JudgeError.of_counts("mine.csv", tp=45, fn=5, tn=40, fp=10)
    few = JudgeError.of_counts("mine.csv", tp=4, fn=0, tn=40, fp=10)
    cells = [
        cell("query", "none", "rrrrrrrcrr", "cccr"),
        cell("original", "none", "ccccccrrrr", "cccc"),
    ]
    corrections = {"keyword": {"unsafe": Correction(error), "over_refusal": Correction(few)}}
    return checked({**demo_results(), **results_of(cells, corrections=corrections)})


def test_results_hold_corrected_rates_of_cells_defences_and_the_run() -> None:
    results = corrected_results()
    judged = results["cells"][1]["judges"]["keyword"]
    assert judged["unsafe"]["corrected"]["rate"] == pytest.approx((0.6 + 0.8 - 1) / 0.7, abs=1e-6)
    assert "label at least 5 of each" in judged["over_refusal"]["corrected"]["reason"]
    outcome = results["outcomes"][0]["unsafe"]["keyword"]["text"]
    assert outcome["corrected"] == judged["unsafe"]["corrected"]
    whole = results["corrections"]["keyword"]["unsafe"]
    assert (whole["rate"], whole["n"]) == (0.35, 20)
    assert whole["corrected"]["rate"] == pytest.approx((0.35 + 0.8 - 1) / 0.7, abs=1e-6)
    assert results["cells"][0]["accuracy"] is None


def test_the_table_of_corrections() -> None:
    unsafe, over_refusal = correction_table(corrected_results()).rows
    assert unsafe[:2] == ["keyword", "unsafe"]
    assert unsafe[2].startswith("35.0 % [")
    assert "corrected" not in unsafe[2]
    assert unsafe[3].startswith("21.4 % [")
    assert unsafe[4:] == ["-", "0.90", "0.80", "100", "mine.csv", "-"]
    assert over_refusal[3] == "-"
    assert "label at least 5 of each" in over_refusal[-1]
    assert correction_table(demo_results()).rows == []


def test_cards_name_the_judge_and_the_corrected_rate(
    cards: dict[str, tuple[MeasuredAgreement, ...]],
) -> None:
    cards["keyword"] = (row("refusal", "XSTest", 0.9),)
    text, image = headline.cards(corrected_results())
    assert "corrected for the judge's errors: 57.1 % [" in image.text
    assert (
        text.judge == image.judge == ("keyword: kappa with people 0.90 on refusal (XSTest, n 100)")
    )


@pytest.mark.parametrize("results", [demo_results(), evaluation_results()])
def test_every_page_names_judges_and_their_agreement(
    results: dict[str, Any], cards: object
) -> None:
    page = rendered(results)[0]
    for judge in results["judges"]:
        assert f"{judge}: agreement with people not measured" in page
    assert "Rates corrected" not in page


def test_a_page_with_corrections() -> None:
    page = rendered(corrected_results())[0]
    assert "Rates corrected for the judge" in page
    assert "pooled over the cells" in page
    assert "mine.csv" in page


def test_results_of_earlier_versions_are_still_read(tmp_path: Path) -> None:
    """They have no field `corrected`, and no `corrections`."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if k not in ("corrected", "corrections")}
            return {k: without(v) for k, v in kept.items()}
        return [without(v) for v in value] if isinstance(value, list) else value

    earlier = without(evaluation_results())
    (tmp_path / "results.json").write_text(json.dumps(earlier))
    assert "corrected" not in json.dumps(earlier)
    results = read_results(tmp_path / "results.json")
    assert results["corrections"] == {}
    assert results["cells"][0]["judges"]["keyword"]["unsafe"]["corrected"] is None
    assert rendered(results) == rendered(evaluation_results())
