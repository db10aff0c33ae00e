"""One file for a study: bound by content, continued after any end."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import TrialState

from cmrm.errors import InputError
from cmrm.tune.space import distributions
from cmrm.tune.study import Study
from tune.test_spaces import SPACE

BOUND = {"model": "m", "dev set": "d"}
POINT = {
    "alpha": 1.0, "share": 0.5, "rank": 2, "mixed": True, "layers.first": 1, "layers.last": 2,
}  # fmt: skip
FACTS = {"origin": "default", "settings": {"alpha": 1}, "seconds": 1.0, "partial": [0.5, 0.5]}


def opened(file: Path, **bound: str) -> Study:
    return Study(file, {**BOUND, **bound}, objectives=2, seed=0)


def test_trials_are_there_for_the_next_call(tmp_path: Path) -> None:
    file = tmp_path / "a#b ?c%20" / "study.db"
    study = opened(file)
    study.add((0.5, 0.25), FACTS)
    study.enqueue([POINT], "proxy")
    study.put("seconds", 3.5)
    trial = study.ask(distributions(SPACE))
    assert trial.params == POINT
    study.tell(trial, TrialState.COMPLETE, (0.1, 0.2), settings={"alpha": 2}, seconds=1.0)
    trial = study.ask(distributions(SPACE))
    study.tell(trial, TrialState.PRUNED, settings={"alpha": 3}, seconds=1.0, reason="worse")
    trial = study.ask(distributions(SPACE))
    study.tell(trial, TrialState.FAIL, settings={"alpha": 4}, seconds=1.0, reason="no layer")
    assert file.is_file()
    rows = opened(file).rows()
    assert rows == study.rows()
    assert [row.state for row in rows] == ["finished", "finished", "pruned", "failed"]
    assert [row.values for row in rows] == [(0.5, 0.25), (0.1, 0.2), (), ()]
    assert [row.default for row in rows] == [True, False, False, False]
    assert rows[1].attributes["origin"] == "proxy"
    assert opened(file).get("seconds") == 3.5
    assert opened(file).get("nothing") is None


def test_a_trial_that_a_killed_call_left_is_tried_again(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    study.enqueue([POINT], "proxy")
    study.ask(distributions(SPACE))
    again = opened(tmp_path / "study.db")
    assert again.rows() == [], "it is not counted"
    trial = again.ask(distributions(SPACE))
    assert trial.params == POINT
    assert trial.user_attrs["origin"] == "proxy"
    again.tell(trial, TrialState.COMPLETE, (0.1, 0.2), **{**FACTS, "origin": "proxy"})
    assert [row.number for row in opened(tmp_path / "study.db").rows()] == [trial.number]


def test_it_comes_before_the_queue(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    study.enqueue([POINT, POINT | {"rank": 3}], "proxy")
    study.ask(distributions(SPACE))
    again = opened(tmp_path / "study.db")
    assert [again.ask(distributions(SPACE)).params["rank"] for _ in range(2)] == [2, 3]


def test_a_trial_that_never_got_a_point_is_forgotten(tmp_path: Path) -> None:
    study = opened(tmp_path / "study.db")
    study.ask(distributions(SPACE[:2]))
    again = opened(tmp_path / "study.db")
    assert set(again.ask(distributions(SPACE)).params) == set(POINT)
    assert again.rows() == []


def test_another_sampler_goes_on(tmp_path: Path) -> None:
    """A call does not draw the points of the call before it again."""
    first = opened(tmp_path / "study.db").ask(distributions(SPACE))
    assert opened(tmp_path / "other.db").ask(distributions(SPACE)).params == first.params, "seeded"
    study = opened(tmp_path / "study.db")
    points = [study.ask(distributions(SPACE)).params for _ in range(2)]
    assert points[0] == first.params, "the one that was left"
    assert points[1] != first.params


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    opened(tmp_path / "study.db")
    with pytest.raises(InputError, match=r"is a study of another model; name another folder"):
        opened(tmp_path / "study.db", model="other")
    with pytest.raises(InputError, match="another model and another dev set"):
        Study(tmp_path / "study.db", {"model": "o", "dev set": "o"}, objectives=2, seed=0)
    opened(tmp_path / "study.db")


def test_what_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a text" * 500)
    for place in (tmp_path / "file", tmp_path / "file" / "study.db", tmp_path):
        with pytest.raises(InputError, match="cannot be used as a study") as caught:
            opened(place)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "a text" * 500
