"""Corrections by labelled replies of another source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cmrm.errors import InputError
from cmrm.judges import Verdict
from cmrm.measure.agreement import Answer, Label, Rated
from cmrm.measure.rates import rate_of
from cmrm.measure.validation import corrections_in, errors_on, keep_validation, read_validation

WORDS = {
    "no": Verdict.REFUSED, "yes": Verdict.COMPLIED, "safe": Verdict.SAFE, "?": Verdict.UNSCORED
}  # fmt: skip


class ByWord:
    """A judge that goes by the first word of a reply."""

    name = "word"

    def judge(self, request: str, reply: str) -> Verdict:
        return WORDS[reply.split()[0]]


def answer(reply: str, refused: bool | None, unsafe: bool | None) -> Answer:
    return Answer(Label(refused, unsafe), "a request", reply, "f.csv line 2")


def test_right_wrong_and_unscored_verdicts_are_counted() -> None:
    answers = [
        answer("no", True, False), answer("no", False, True), answer("yes", False, True),
        answer("yes", None, False), answer("safe", True, None), answer("? hm", True, True),
    ]  # fmt: skip
    assert errors_on(answers, {"word": ByWord()}) == {
        "word": {
            "unsafe": {"tp": 1, "fn": 1, "tn": 1, "fp": 1, "unscored": 1},
            "over_refusal": {"tp": 1, "fn": 0, "tn": 1, "fp": 1, "unscored": 2},
        }
    }


def test_an_outcome_that_a_judge_never_answers_is_left_out() -> None:
    errors = errors_on([answer("safe", True, False)], {"guard": ByWord()})
    assert set(errors["guard"]) == {"unsafe"}


def sheet(path: Path) -> Path:
    """9 of 10 refusals and 8 of 10 answers are recognised."""
    rows = [("no", "yes")] * 9 + [("yes", "yes")] + [("yes", "no")] * 8 + [("no", "no")] * 2
    lines = [f"r{k},q{k},{reply},{refused}," for k, (reply, refused) in enumerate(rows)]
    path.write_text("id,request,reply,refused,unsafe\n" + "\n".join(lines) + "\n")
    return path


def test_errors_are_kept_in_the_folder_of_a_run(tmp_path: Path) -> None:
    assert read_validation(tmp_path) == {}
    keep_validation(tmp_path, sheet(tmp_path / "mine.csv"), {"word": ByWord()})
    corrections = read_validation(tmp_path)
    assert set(corrections["word"]) == {"over_refusal"}
    corrected = corrections["word"]["over_refusal"].of(rate_of(30, 100))
    assert (corrected.sensitivity, corrected.specificity) == (0.9, 0.8)
    assert corrected.rate == pytest.approx(1 / 7, abs=1e-6)
    assert corrected.source == "mine.csv"
    keep_validation(tmp_path, sheet(tmp_path / "other.csv"), {"second": ByWord()})
    assert set(read_validation(tmp_path)) == {"word", "second"}


def test_labels_of_the_run_come_first_where_they_suffice(tmp_path: Path) -> None:
    keep_validation(tmp_path, sheet(tmp_path / "mine.csv"), {"word": ByWord()})
    rows = [
        Rated(f"r{k}", ("benign",), f"q{k}", "a", False, {"word": Verdict.REFUSED if k % 2 else
              Verdict.COMPLIED})
        for k in range(20)
    ]  # fmt: skip

    def source(n: int) -> str:
        labels = {row.id: Label(bool(k % 2), None) for k, row in enumerate(rows[:n])}
        return corrections_in(tmp_path, rows, labels)["word"]["over_refusal"].error.source

    assert source(0) == source(8) == "mine.csv"
    assert source(10) == "labels of this run"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"word": {"source": "x"}}',
        '{"word": {"source": "x", "outcomes": {"unsafe": {"tp": 1}}}}',
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation.json").write_text(text)
    with pytest.raises(InputError, match=r"validation\.json is damaged"):
        read_validation(tmp_path)


def test_what_is_kept_names_no_reply(tmp_path: Path) -> None:
    keep_validation(tmp_path, sheet(tmp_path / "mine.csv"), {"word": ByWord()})
    kept = json.loads((tmp_path / "validation.json").read_text())
    assert set(kept["word"]) == {"source", "outcomes"}
