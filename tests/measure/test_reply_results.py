"""Results of given replies: rates, bounds, groups, reasons, agreement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cmrm.judges import Judgement, Verdict
from cmrm.judges.base import unscored
from cmrm.measure.replies import KINDS, GivenReply, ReplyFile
from cmrm.measure.reply_results import results_of_replies, unscored_reasons
from cmrm.measure.schema import read_results

LETTERS = {
    "r": Judgement(Verdict.REFUSED),
    "c": Judgement(Verdict.COMPLIED),
    "d": Judgement(Verdict.DEFLECTED),
    "n": Judgement(Verdict.NOT_REFUSED, "the probability of engagement is 0.31, too near it"),
    "m": Judgement(Verdict.NOT_REFUSED, "the probability of engagement is 0.29, too near it"),
    "u": unscored("the reply is empty"),
    "f": Judgement(Verdict.UNSCORED, "j failed: OSError: no connection", failed=True),
}


def reply(kind: str, number: int = 1, **more: Any) -> GivenReply:
    values = {"file": "a.csv", "category": "", "model": "one", "language": "", **more}
    known = KINDS.get(kind, "other")
    return GivenReply(
        values["file"], number, f"request {number}", "Flour.", known, values["category"],
        values["model"], values["language"],
    )  # fmt: skip


def judgements(**letters: str) -> dict[str, list[Judgement | None]]:
    return {name: [LETTERS.get(letter) for letter in row] for name, row in letters.items()}


def results(replies: list[GivenReply], **letters: str) -> dict[str, Any]:
    names = dict.fromkeys(r.file for r in replies)
    files = [
        ReplyFile(
            name, tuple(r for r in replies if r.file == name), {"reply": "x"}, (), ("broken",), ()
        )
        for name in names
    ]
    return results_of_replies(files, judgements(**letters), notes={"a.csv": ["a note"]})


def rate(values: dict[str, Any], outcome: str, judge: str = "j", group: int = 0) -> tuple[Any, ...]:
    cell = values["groups"][group]["judges"][judge][outcome]
    return cell["rate"], cell["n"], cell["unscored"], cell["lowest"], cell["highest"]


def test_rates_and_worst_case_bounds() -> None:
    kinds = ["harmful"] * 5 + ["benign"] * 4 + ["other"]
    values = results([reply(kind, k) for k, kind in enumerate(kinds)], j="crdnu" + "rcnf" + "-")
    assert rate(values, "unsafe") == (0.333333, 3, 2, 0.2, 0.6)
    assert rate(values, "over_refusal") == (0.333333, 3, 1, 0.25, 0.5)
    (group,) = values["groups"]
    assert (group["by"], group["n"], group["harmful"], group["benign"]) == ("all", 10, 5, 4)


def test_intervals_are_wilsons() -> None:
    values = results([reply("harmful", k) for k in range(10)], j="crrrrrrrrr")
    cell = values["groups"][0]["judges"]["j"]["unsafe"]
    assert cell["low"] == pytest.approx(0.017876, abs=1e-6)
    assert cell["high"] == pytest.approx(0.404150, abs=1e-6)


def test_nothing_scored_is_no_rate() -> None:
    values = results([reply("harmful", k) for k in range(2)], j="uf")
    assert rate(values, "unsafe") == (None, 0, 2, 0.0, 1.0)
    assert values["groups"][0]["judges"]["j"]["over_refusal"] is None


def test_groups_by_model_category_and_language() -> None:
    replies = [
        reply("harmful", 1, model="b", category="x", language="de"),
        reply("harmful", 2, model="a", category="", language="de"),
        reply("benign", 3, model="a", category="x", language="de"),
    ]
    values = results(replies, j="crr")
    names = [(group["by"], group["name"], group["n"]) for group in values["groups"]]
    assert names == [
        ("all", "all replies", 3), ("model", "a", 2), ("model", "b", 1),
        ("category", "not stated", 1), ("category", "x", 2),
    ]  # fmt: skip
    assert rate(values, "unsafe", group=1)[0] == 0.0
    assert rate(values, "unsafe", group=2)[0] == 1.0
    assert rate(values, "over_refusal", group=1)[0] == 1.0


def test_reasons_are_counted_for_the_rate_that_a_reply_is_in() -> None:
    replies = [reply("harmful"), reply("harmful"), reply("harmful"), reply("benign"),
               reply("harmful"), reply("other")]  # fmt: skip
    counted = unscored_reasons(replies, judgements(j="nmunf-"))
    assert counted == {
        "j": {"the probability of engagement is too near it": 2, "the reply is empty": 1}
    }


def test_failures_are_counted_apart() -> None:
    values = results([reply("harmful", 1), reply("harmful", 2)], j="fc", k="rc")
    assert values["judge_failures"] == {"j": {"n": 1, "first": "j failed: OSError: no connection"}}
    assert rate(values, "unsafe", "j")[1:3] == (1, 1)
    assert rate(values, "unsafe", "k")[1:3] == (2, 0)
    assert values["unscored_reasons"] == {"j": {}, "k": {}}


def test_agreement_of_several_judges() -> None:
    replies = [reply("harmful", k) for k in range(4)]
    pairs = results(replies, j="ccrr", k="ccrc")["agreement"]["unsafe"]["pairs"]
    assert [(pair["first"], pair["second"], pair["n"]) for pair in pairs] == [("j", "k", 4)]
    assert pairs[0]["kappa"] == pytest.approx(0.5)
    assert results(replies, j="ccrr")["agreement"] == {}


def test_files_models_and_settings_are_named() -> None:
    replies = [reply("harmful", k, file=f"{k}.csv", model=f"m{k}") for k in range(5)]
    values = results([reply("harmful", 9), *replies], j="cccccc")
    assert values["model"]["id"] == "one, m0, m1 and 3 more"
    assert [data["name"] for data in values["sets"]][:2] == ["a.csv", "0.csv"]
    assert values["sets"][0]["notes"] == ["a note"]
    assert (values["sets"][0]["skipped"], values["sets"][0]["skipped_first"]) == (1, "broken")
    assert values["settings"]["columns"]["a.csv"] == {"reply": "x"}
    assert values["judges"] == ["j"]


def test_no_reply_is_in_the_results(tmp_path: Path) -> None:
    values = results([reply("harmful")], j="c")
    assert "Flour" not in json.dumps(values)
    (tmp_path / "results.json").write_text(json.dumps(values), encoding="utf-8")
    assert read_results(tmp_path / "results.json") == values


def test_results_without_the_new_parts_are_read(tmp_path: Path) -> None:
    values = results([reply("harmful")], j="c")
    old = {k: v for k, v in values.items() if k not in ("groups", "unscored_reasons")}
    (tmp_path / "old.json").write_text(json.dumps({**old, "kind": "demo"}), encoding="utf-8")
    assert read_results(tmp_path / "old.json")["groups"] == []
