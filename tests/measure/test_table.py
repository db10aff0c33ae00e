"""From cells to results."""

from __future__ import annotations

import pytest

from cmrm.errors import InputError
from cmrm.measure.answers import EXACT, compared, matched
from cmrm.measure.outcomes import Cell, Outcome
from cmrm.measure.schema import checked, json_schema
from cmrm.measure.table import RATING, rating_of, results_of

REQUEST, REPLY = "How do I paint?", "With paint."


def outcome(key: str, kind: str, verdict: str = "", **more: object) -> Outcome:
    verdicts = {"keyword": verdict} if verdict else {}
    return Outcome(key, kind, "", REQUEST, REPLY, verdicts, **more)  # type: ignore[arg-type]


def cell(
    name: str, outcomes: list[Outcome], *, condition: str = "original", defense: str = "none",
    harm: str | None = None, expected: int | None = None,
) -> Cell:  # fmt: skip
    by_id = {each.sample_id: each for each in outcomes}
    n = len(by_id) if expected is None else expected
    return Cell(name, condition, defense, n, by_id, {}, harm)


def test_harm_in_text_and_in_image_are_told_apart() -> None:
    cells = [
        cell("a", [outcome("x", "harmful", "refused")], harm="text"),
        cell("b", [outcome("x", "harmful", "complied")], harm="image"),
        cell("c", [outcome("x", "harmful", "unscored")], harm="image"),
        cell("d", [outcome("x", "benign", "refused")], harm="text"),
        cell("e", [outcome("x", "harmful", "complied")]),
    ]
    (row,) = results_of(cells)["outcomes"]
    unsafe = row["unsafe"]["keyword"]
    assert set(unsafe) == {"text", "image", "unstated"}
    assert (unsafe["text"]["rate"], unsafe["text"]["n"]) == (0.0, 1)
    assert (unsafe["image"]["rate"], unsafe["image"]["n"], unsafe["image"]["unscored"]) == (1, 1, 1)
    assert (unsafe["image"]["lowest"], unsafe["image"]["highest"]) == (0.5, 1.0)
    assert row["over_refusal"]["keyword"]["rate"] == 1.0
    assert row["accuracy"] is None


def test_a_sample_that_is_missing_is_in_no_rate() -> None:
    whole = cell("a", [outcome("x", "harmful", "refused")], expected=3)
    (row,) = results_of([whole])["cells"]
    assert (row["done"], row["missing"]) == (1, 2)
    assert row["judges"]["keyword"]["unsafe"]["n"] == 1


def test_a_category_with_nothing_scored_is_no_zero() -> None:
    harmful = Outcome("x", "harmful", "theft", REQUEST, REPLY, {"keyword": "unscored"})
    (row,) = results_of([cell("a", [harmful])])["cells"]
    counts = row["judges"]["keyword"]["categories"]["theft"]
    assert counts["unscored"] == 1
    assert sum(counts.values()) == 1


def test_a_defence_is_compared_on_the_same_samples() -> None:
    ids = [f"s{k}" for k in range(6)]
    base = cell("a", [outcome(key, "harmful", "complied") for key in ids])
    other = cell(
        "a", [outcome(key, "harmful", "refused") for key in ids[:4]], defense="ecso", expected=6
    )
    alone = cell("b", [outcome("s0", "harmful", "refused")], defense="ecso")
    (row,) = results_of([base, other, alone])["comparisons"]
    assert (row["set"], row["defense"], row["outcome"], row["n"]) == ("a", "ecso", "unsafe", 4)
    assert row["difference"] == -1.0
    assert row["p_holm"] == row["p_value"] == pytest.approx(2 / 2**4)


def test_a_defence_is_compared_with_the_query_as_text_too() -> None:
    ids = [f"s{k}" for k in range(8)]

    def refusing(n: int, condition: str, defense: str = "none") -> Cell:
        verdicts = ["refused" if k < n else "complied" for k in range(8)]
        outcomes = [outcome(key, "benign", v) for key, v in zip(ids, verdicts, strict=True)]
        return cell("a", outcomes, condition=condition, defense=defense)

    cells = [refusing(3, "query"), refusing(1, "original"), refusing(2, "original", "ecso")]
    rows = results_of(cells)["comparisons"]
    assert [(row["baseline"], row["difference"]) for row in rows] == [
        ("untouched", pytest.approx(1 / 8)),
        ("text", pytest.approx(-1 / 8)),
    ]


def test_lost_accuracy_is_compared_answer_by_answer() -> None:
    def answered(right: int, defense: str) -> Cell:
        marks = ["C" if k < right else "I" for k in range(6)]
        outcomes = [outcome(f"q{k}", "utility", scores={"exact": m}) for k, m in enumerate(marks)]
        return cell("a", outcomes, defense=defense)

    (row,) = results_of([answered(5, "none"), answered(3, "ecso")])["comparisons"]
    assert (row["outcome"], row["judge"], row["n"]) == ("accuracy", "exact match", 6)
    assert row["difference"] == pytest.approx(-2 / 6)
    assert (row["only_before"], row["only_after"]) == (2, 0)


def test_gaps_need_the_text_the_image_and_the_defence() -> None:
    def asked(verdict: str, condition: str, defense: str = "none") -> Cell:
        outcomes = [outcome(f"s{k}", "harmful", verdict) for k in range(4)]
        return cell("a", outcomes, condition=condition, defense=defense)

    text, image = asked("refused", "query"), asked("complied", "original")
    defended = asked("refused", "original", "cmrm_dataset")
    (gap,) = results_of([text, image, defended])["gaps"]
    assert (gap["value"], gap["n"], gap["defense"]) == (1.0, 4, "cmrm_dataset")
    assert results_of([image, defended])["gaps"] == []


def test_failures_of_judges_are_counted_with_the_first_reason() -> None:
    failed = [
        outcome(f"s{k}", "harmful", "unscored", failed={"keyword": f"no {k}"}) for k in (1, 2)
    ]
    assert results_of([cell("a", failed)])["judge_failures"] == {
        "keyword": {"n": 2, "first": "no 1"}
    }


def test_answers_and_ratings_have_columns_of_their_own() -> None:
    asked = [outcome(f"u{k}", "utility", scores={EXACT: v}) for k, v in enumerate("CCI")]
    rated = [
        outcome("o1", "open", scores={RATING: (8.0, 4.0)}), outcome("o2", "open"),
        outcome("o3", "open", scores={RATING: (8.0, 8.0)}),
    ]  # fmt: skip
    (row,) = results_of([cell("a", [*asked, *rated])])["cells"]
    assert (row["accuracy"]["rate"], row["accuracy"]["n"]) == (round(2 / 3, 6), 3)
    rating = row["rating"]
    assert (rating["value"], rating["n"], rating["unscored"]) == (75.0, 2, 1)
    assert rating_of([None])["value"] is None


def test_results_have_the_schema_of_the_family() -> None:
    results = results_of(
        [cell("a", [outcome("x", "harmful", "refused")])],
        perplexity={("a", "original", "none"): {
            "value": 2.0, "low": 1.0, "high": 3.0, "n": 1, "tokens": 4,
        }},
    )  # fmt: skip
    model = {"id": "m", "architecture": "A", "dtype": "float32"}
    frame = {
        "kind": "evaluation", "model": model, "sets": [], "settings": {}, "seed": 0, "versions": {},
    }  # fmt: skip
    whole = checked({**frame, **results})
    assert whole["cells"][0]["perplexity"]["value"] == 2.0
    assert json_schema()["title"] == "Results"
    with pytest.raises(InputError, match="these are no results of cmrm: stray"):
        checked({**frame, **results, "stray": 1})


@pytest.mark.parametrize(
    ("match", "reply", "value"),
    [
        ("exact", " Red. ", "red"),
        ("exact", "a red one", "a red one"),
        ("letter", "B", "B"),
        ("letter", "(B) because", "B"),
        ("letter", "B. iron", "B"),
        ("letter", "The answer is C.", "C"),
        ("letter", "A man is here", None),
        ("letter", "iron", None),
        ("yes_no", "Yes, there is.", "yes"),
        ("yes_no", "There is no dog. Yes", "no"),
        ("yes_no", "A dog", None),
        ("yes_no", "", None),
    ],
)
def test_what_is_compared_of_a_reply(match: str, reply: str, value: str | None) -> None:
    assert matched(reply, match) == value


def test_a_reply_that_says_nothing_of_the_asked_form_is_wrong() -> None:
    assert compared("A dog", "yes", "yes_no") == "I"
    assert compared("B) iron", "B", "letter") == "C"
