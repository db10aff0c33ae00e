"""The draw of a sheet: every group, more where judges are unsure, with known probabilities."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmrm.errors import InputError
from cmrm.judges import Verdict
from cmrm.measure.agreement import Label, Rated, keep_labels, read_labels, weights_of
from cmrm.measure.drawing import drawn_with, record_draw, shares, systematic
from cmrm.measure.sheet import draw, uncertainties
from measure.test_agreement import answer, rated

R, C, S, U, N = Verdict.REFUSED, Verdict.COMPLIED, Verdict.SAFE, Verdict.UNSAFE, Verdict.UNSCORED


def test_a_draw_is_even_seeded_and_without_repetition() -> None:
    rows = [rated(k, defense=("none", "cmrm")[k % 10 == 0], harmful=k % 3 > 0) for k in range(90)]
    rows += [rated(200 + k, defense="none", reply="same") for k in range(3)]
    drawn = draw(rows, 12, seed=1)[0]
    assert [r.id for r in drawn] == [r.id for r in draw(list(reversed(rows)), 12, seed=1)[0]]
    assert [r.id for r in drawn] != [r.id for r in draw(rows, 12, seed=2)[0]]
    counts = Counter(row.group for row in drawn)
    assert set(counts.values()) == {3}, "as many of each group, though there are fewer of one"
    assert len(counts) == 4
    same = [Rated(f"{k}", ("harmful",), "q", "the same", True) for k in range(4)]
    assert len(draw(same, 3)[0]) == 1


def test_a_small_group_gives_all_and_the_others_share_the_rest() -> None:
    rows = [rated(k, defense="none") for k in range(40)]
    rows += [rated(100 + k, defense="ecso") for k in range(2)]
    drawn, probabilities = draw(rows, 10)
    assert Counter(row.group[1] for row in drawn) == {"none": 8, "ecso": 2}
    assert {probabilities[row.id] for row in rows[:40]} == {0.2}
    assert {probabilities[row.id] for row in rows[40:]} == {1.0}


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match="at least 1"):
        draw([rated(0)], 0)
    with pytest.raises(InputError, match="no replies"):
        draw([], 5)


def test_replies_that_judges_are_unsure_of_are_three_times_as_likely() -> None:
    """20 of 100 replies are unscored: 3 / (80 + 3 x 20) of 28 draws is 0.6, the others' 0.2."""
    rows = [rated(k, keyword=N if k < 20 else R) for k in range(100)]
    drawn, probabilities = draw(rows, 28)
    assert {round(probabilities[row.id], 9) for row in rows[:20]} == {0.6}
    assert {round(probabilities[row.id], 9) for row in rows[20:]} == {0.2}
    assert sum(row.verdicts["keyword"] is N for row in drawn) == 12


def test_what_makes_a_reply_unsure() -> None:
    sure = rated(0, keyword=R, guard=S)
    contradicted = rated(1, keyword=C, guard=S)
    unscored = rated(2, keyword=N, guard=S)
    benign = rated(3, harmful=False, keyword=R, guard=S)
    half = Rated("4", ("harmful",), "q", "r", True, {"small": R}, {"small": (0.5, 0.0)})
    quarter = Rated("5", ("harmful",), "q", "r", True, {"small": R}, {"small": (None, 0.25)})
    other = Rated("6", ("benign",), "q", "r", False, {"small": R}, {"small": (1.0, 0.5)})
    measured = uncertainties([sure, contradicted, unscored, benign, half, quarter, other])
    assert measured[sure.id] == 0
    assert measured[contradicted.id] == measured[unscored.id] == measured["4"] == 1
    assert measured["5"] == 0.5
    assert measured[benign.id] == 0, "a guard never says whether a reply refuses"
    assert measured["6"] == 0, "engagement is no question on a benign request"


def test_the_probabilities_are_those_of_the_draw() -> None:
    """Over 600 draws, the share in which each reply is drawn is its probability, within 5 standard
    errors."""
    rows = [
        rated(k, defense=("none", "ecso")[k % 7 == 0], keyword=N if k % 4 == 0 else R)
        for k in range(40)
    ]
    counts: Counter[str] = Counter()
    for seed in range(600):
        drawn, probabilities = draw(rows, 9, seed=seed)
        assert len(drawn) == 9
        counts.update(row.id for row in drawn)
    for row in rows:
        chance = probabilities[row.id]
        error = (chance * (1 - chance) / 600) ** 0.5
        assert abs(counts[row.id] / 600 - chance) <= 5 * error


def test_a_text_that_stands_twice_is_drawn_from_the_smaller_group() -> None:
    rows = [rated(k, defense="none") for k in range(5)]
    copy = Rated("copy", ("harmful", "ecso"), "request 0", "reply 0", True)
    drawn, probabilities = draw([*rows, copy], 5)
    assert "copy" in {row.id for row in drawn}
    assert rows[0].id not in probabilities


@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=12), st.integers(1, 30), st.integers(0, 99))
def test_shares_and_systematic_draws(sizes: list[float], n: int, seed: int) -> None:
    most = np.ones(len(sizes))
    parts = shares(n, np.array(sizes), most)
    assert parts.sum() == pytest.approx(min(n, len(sizes)))
    assert (parts <= most + 1e-12).all()
    taken = systematic(parts, np.random.default_rng(seed))
    assert len(set(taken.tolist())) == len(taken) == min(n, len(sizes))
    free = parts < 1 - 1e-9
    ratios = parts[free] / np.array(sizes)[free]
    assert np.allclose(ratios, ratios[0] if len(ratios) else 0)


def test_two_sheets_bring_a_reply_with_either_probability(tmp_path: Path) -> None:
    record_draw(tmp_path, {"a": 0.5, "b": 0.5}, ["a"], seed=0)
    record_draw(tmp_path, {"a": 0.2, "b": 0.8, "c": 0.4}, ["b", "c"], seed=1)
    record_draw(tmp_path, {"a": 0.2, "b": 0.8, "c": 0.4}, ["b", "c"], seed=1)
    probabilities, drawn = drawn_with(tmp_path, ["a", "b", "c", "x"])
    assert probabilities == pytest.approx(
        {"a": 1 - 0.5 * 0.8, "b": 1 - 0.5 * 0.2, "c": 0.4, "x": 0}
    )
    assert drawn == {"a", "b", "c"}
    assert drawn_with(tmp_path, ["a"])[0]["a"] == 0.5, "a sheet without labels does not count"
    half = drawn_with(tmp_path, ["a", "b"])[0]["b"]
    assert half == pytest.approx(1 - 0.5 * (1 - 0.8 / 2)), "half of the second sheet is labelled"


@pytest.mark.parametrize(
    "text", ["[1]", "{", '[{"drawn": ["a"], "probabilities": {"a": 2}}]',
             '[{"drawn": ["b"], "probabilities": {"a": 0.5}}]']
)  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "sheets.json").write_text(text)
    with pytest.raises(InputError, match="no record of drawn sheets"):
        drawn_with(tmp_path, ["a"])
    with pytest.raises(InputError, match="no record of drawn sheets"):
        record_draw(tmp_path, {"a": 0.5}, ["a"], seed=0)


def test_labels_of_a_recorded_sheet_stand_for_one_over_their_probability(tmp_path: Path) -> None:
    rows = [rated(k, keyword=N if k < 2 else R) for k in range(12)]
    rows.append(Rated("copy", ("harmful", "none"), "request 0", "reply 0", True, {"keyword": N}))
    probabilities = dict.fromkeys([row.id for row in rows[:12]], 0.25) | {rows[0].id: 0.75}
    record_draw(tmp_path, probabilities, [rows[0].id, rows[5].id], seed=0)
    keep_labels(tmp_path, rows, answer(rows[0], True, False) | answer(rows[5], False, True))
    weights = weights_of(rows, read_labels(tmp_path))
    assert weights == pytest.approx({rows[0].id: 2 / 0.75, rows[5].id: 1 / 0.25})


def test_labels_without_a_record_count_evenly_within_their_group() -> None:
    """10 untouched replies with 2 labels, 4 defended ones with 2: weights 5 and 2."""
    rows = [rated(k, defense="none") for k in range(10)]
    rows += [rated(20 + k, defense="ecso") for k in range(4)]
    labels = {rows[k].id: Label(True, None) for k in (0, 1, 10, 11)}
    assert list(weights_of(rows, labels).values()) == pytest.approx([5, 5, 2, 2])


def test_labels_of_both_kinds_of_sheet_together() -> None:
    """A reply of an earlier sheet that the recorded one could draw too: 1 - (1 - 0.2) (1 - 0.5)."""
    rows = [rated(k) for k in range(4)]
    labels = {
        rows[0].id: Label(True, None, 0.2, recorded=True),
        rows[1].id: Label(True, None, 0.2),
        rows[2].id: Label(True, None, 0.2),
        rows[3].id: Label(None, None),
    }
    weights = weights_of(rows, labels)
    assert weights == pytest.approx(dict.fromkeys([row.id for row in rows[:3]], 1 / 0.6))
