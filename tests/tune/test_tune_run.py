"""The search on the tiny model, with replies that depend on the strength of the steering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cmrm.tune.run as run_module
from cmrm.defenses import make_defense
from cmrm.engines.base import Reply
from cmrm.engines.transformers import TransformersEngine
from cmrm.errors import InputError
from cmrm.judges import make_judge
from cmrm.measure.store import ReplyStore
from cmrm.prompts.conditions import Request
from cmrm.shift.artifact import ShiftVectors
from cmrm.tune.choose import Limits
from cmrm.tune.fitting import Fitter
from cmrm.tune.measuring import Bench
from cmrm.tune.remembering import Remembering
from cmrm.tune.results import tuned, write_tuned
from cmrm.tune.run import Options, Search, Tuner, duration_text, tunable
from cmrm.tune.schema import read_tuned
from cmrm.tune.sets import Sets
from tiny import vlm_of
from tune.scripted import answer
from tune.sources import small_sets

Asked = list[Sequence[str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Texts of every batch that is generated."""
    batches: Asked = []

    def recorded(engine: Any, requests: Sequence[Request], *args: Any, **more: Any) -> list[Reply]:
        batches.append([request.text for request in requests])
        return answer(engine, requests, *args, **more)

    monkeypatch.setattr(TransformersEngine, "answer", recorded)
    return batches


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "CANDIDATES", 6)
    monkeypatch.setattr(run_module, "KEPT", 2)


@pytest.fixture(scope="module")
def sets() -> Sets:
    return small_sets()


Start = Callable[..., Tuner]


@pytest.fixture
def start(engine: Remembering, sets: Sets, tmp_path: Path, asked: Asked) -> Start:
    """A tuner in the folder of the test."""

    def begin(
        defense: str = "cmrm_dataset", *, budget: float = 600, trials: int | None = 6, **more: Any
    ) -> Tuner:
        judges = {name: make_judge(name) for name in more.pop("judges", ("small", "keyword"))}
        bench = Bench(engine, judges, ReplyStore(tmp_path / "replies.db"), 8, 8)
        options = Options(defense, budget, more.pop("limits", Limits()), trials)
        return Tuner(bench, more.pop("sets", sets), options, tmp_path, **more)

    return begin


def result_of(tuner: Tuner, search: Search) -> dict[str, Any]:
    return tuned(search, tuner.bench, tuner.sets, tuner.options)


def test_default_first_then_what_the_proxy_likes_then_the_sampler(start: Start) -> None:
    said: list[str] = []
    search = start(trials=6, say=said.append).run()
    assert [row.attributes["origin"] for row in search.rows] == [
        "default", *["proxy"] * 3, *["search"] * 2,
    ]  # fmt: skip
    default = make_defense("cmrm_dataset").settings
    assert search.rows[0].attributes["settings"] == default
    settings = [row.attributes["settings"] for row in search.rows]
    assert all(one not in settings[:place] for place, one in enumerate(settings)), "no point twice"
    assert all(set(one) == set(default) for one in settings), "whole settings are stored"
    assert said[0] == "the untouched model"
    assert "the proxy, random point 6" in said
    assert search.base == (1.0, 0.0, 0.0)
    proxies = [row.attributes["proxy"] for row in search.rows]
    assert len({row["harmful"] for row in proxies}) > 3


def test_nothing_is_measured_twice(start: Start, asked: Asked) -> None:
    first = start(trials=4).run()
    asked.clear()
    again = start(trials=4).run()
    assert asked == []
    assert again.rows == first.rows
    said: list[str] = []
    longer = start(trials=5, say=said.append).run()
    assert not any("the proxy" in text for text in said), "points are screened once in a study"
    assert longer.rows[:4] == first.rows
    assert len(longer.rows) == 5
    assert longer.seconds > first.seconds, "the time of all calls counts"
    assert len(asked) == 6, "one trial: a batch of each kind, on the quarter and on the rest"


def test_interrupted_in_a_trial(
    start: Start, monkeypatch: pytest.MonkeyPatch, asked: Asked
) -> None:
    recorded = TransformersEngine.answer
    left = [15]

    def stopping(engine: Any, *args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return recorded(engine, *args, **more)

    monkeypatch.setattr(TransformersEngine, "answer", stopping)
    with pytest.raises(KeyboardInterrupt):
        start(trials=4).run()
    monkeypatch.setattr(TransformersEngine, "answer", recorded)
    search = start(trials=4).run()
    assert len(asked) == 5 * 6, "untouched and four trials: no batch is repeated"
    assert [row.attributes["origin"] for row in search.rows] == ["default", *["proxy"] * 3]
    assert [row.number for row in search.rows] == [0, 1, 2, 3]


def test_the_budget_ends_the_search(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1.0
        return clock[0]

    monkeypatch.setattr(run_module, "monotonic", tick)
    search = start("coca", budget=60, trials=None).run()
    assert 2 <= len(search.rows) <= 12
    assert search.seconds <= 75
    again = start("coca", budget=60, trials=None).run()
    assert len(again.rows) == len(search.rows), "the study has one budget over all calls"
    more = start("coca", budget=90, trials=None).run()
    assert len(more.rows) > len(search.rows)


def test_a_budget_that_is_too_small_is_said_before_a_trial(
    start: Start, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [0.0]

    def slow() -> float:
        seconds[0] += 30.0
        return seconds[0]

    monkeypatch.setattr(run_module, "monotonic", slow)
    with pytest.raises(InputError, match=r"a budget of 50s is too small for one trial: the untouc"):
        start(budget=50).run()
    assert len(asked) == 3, "the quarter was enough to see it"
    tuner = start(budget=50)
    assert tuner.study.rows() == []
    assert [duration_text(s) for s in (0.1, 50, 119.2, 120, 121)] == [
        "1s", "50s", "2m", "2m", "3m",
    ]  # fmt: skip


def test_a_dominated_trial_is_stopped_on_the_quarter(
    start: Start, sets: Sets, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "hopeless", lambda values, sizes, earlier: max(earlier))
    search = start(trials=3).run()
    assert [row.state for row in search.rows] == ["finished", "pruned", "pruned"]
    assert search.rows[1].attributes["reason"] == "trial 0 is better on the partial set"
    assert "rates" not in search.rows[1].attributes
    quarter = len(sets.dev.divided()[0].samples)
    assert sum(map(len, asked)) == 2 * len(sets.dev.samples) + 2 * quarter
    monkeypatch.setattr(run_module, "hopeless", lambda values, sizes, earlier: min(earlier))
    assert "the untouched model is better" in start(trials=4).run().rows[3].attributes["reason"]


def test_a_setting_that_cannot_be_used_is_a_failed_trial(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Fitter.fit

    def failing(fitter: Any, defense: Any) -> None:
        if defense.settings != fitter.default.settings:
            raise InputError("no such layer")
        fit(fitter, defense)

    monkeypatch.setattr(Fitter, "fit", failing)
    monkeypatch.setattr(run_module, "IDLE", 4)
    said: list[str] = []
    search = start(trials=None, say=said.append).run()
    assert [row.state for row in search.rows] == ["finished", *["failed"] * run_module.IDLE]
    assert search.rows[1].attributes["reason"] == "no such layer"
    assert "brought nothing new" in said[-1]


def test_a_broken_model_does_not_look_safe(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(engine: Any, requests: Any, interventions: Any = (), *a: Any, **more: Any) -> Any:
        if interventions:
            return [Reply("", 0) for _ in requests]
        return answer(engine, requests)

    monkeypatch.setattr(TransformersEngine, "answer", broken)
    tuner = start(trials=2)
    search = tuner.run()
    assert search.rows[0].values == (1.0, 1.0, 1.0)
    assert result_of(tuner, search)["chosen"] is None


def test_unscored_replies_count_against_a_setting(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(engine: Any, requests: Any, interventions: Any = (), *a: Any, **more: Any) -> Any:
        replies = answer(engine, requests, interventions)
        return [Reply("", 0), *replies[1:]] if len(replies) > 3 else replies

    monkeypatch.setattr(TransformersEngine, "answer", silent)
    search = start("coca", trials=1).run()
    rates = search.untouched["judges"]["small"]
    assert (rates["unsafe"]["n"], rates["unsafe"]["unscored"]) == (7, 1)
    assert rates["over_refusal"]["rate"] == 0.0
    assert search.base[:2] == (1.0, 0.125)


def test_a_judge_that_says_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        TransformersEngine,
        "answer",
        lambda engine, requests, *a, **m: [Reply("", 0)] * len(requests),
    )
    with pytest.raises(InputError, match="'small' scores none of the untouched model's replies"):
        start().run()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"defense": "cmrm_sample"}, "another defence"),
        ({"sets": small_sets(dev=7)}, "another dev set"),
        ({"sets": small_sets(questions=0)}, "another dev set"),
        ({"sets": small_sets(anchors=11)}, "another set of anchors"),
        ({"judges": ("keyword",)}, "another judge"),
    ],
)
def test_a_study_is_bound_to_what_it_compares(
    start: Start, change: dict[str, Any], words: str
) -> None:
    start()
    with pytest.raises(InputError, match=words):
        start(**change)
    start(limits=Limits(1.0, 1.0), trials=1, budget=5)


def test_other_libraries_are_not_another_model(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    monkeypatch.setattr("cmrm.engines.transformers.library_versions", lambda: {"torch": "9"})
    with pytest.raises(InputError, match=r"a study of another set of library versions; name"):
        start()


def test_defences_that_cannot_be_tuned() -> None:
    for name, words in (
        ("nonsense", "unknown defence"), ("ecso", "no settings to tune"), ("none", "no settings"),
        ("ecso+cmrm_sample", "one defence at a time"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            tunable(name)
    with pytest.raises(InputError, match="--trials is 0"):
        Options("cmrm_dataset", 60, trials=0)


@pytest.mark.parametrize("name", ["cmrm_dataset", "cmrm_fill", "cmrm_gated"])
def test_the_artifact_holds_the_choice(
    start: Start, engine: Remembering, tmp_path: Path, name: str
) -> None:
    tuner = start(name, trials=4, limits=Limits(1.0, 1.0))
    search = tuner.run()
    result = result_of(tuner, search)
    write_tuned(result, search, tmp_path)
    assert read_tuned(tmp_path / "tune.json") == result
    shift = ShiftVectors.load(tmp_path / "shift.safetensors")
    shift.check(vlm_of(engine))
    chosen = next(row for row in result["trials"] if row["number"] == result["chosen"])
    setting = shift.recommended.to_json()
    assert {key: chosen["settings"][key] for key in setting} == setting
    assert shift.records["tune"]["trial"] == result["chosen"]
    if name == "cmrm_gated":
        alarms = shift.records["gate"]["wanted_false_alarms"]
        assert alarms == chosen["settings"]["false_alarms"]


def test_evaluate_takes_the_settings_with_the_artifact(start: Start, tmp_path: Path) -> None:
    from cmrm.defenses.cmrm import CmrmDataset
    from cmrm.evaluate.defended import adopt, settings_of, shift_settings

    tuner = start("cmrm_gated", trials=4, limits=Limits(1.0, 1.0))
    search = tuner.run()
    result = result_of(tuner, search)
    write_tuned(result, search, tmp_path)
    name = "cmrm_gated@tuned"
    settings = settings_of((tmp_path / "settings.json").read_text())
    shift = ShiftVectors.load(tmp_path / "shift.safetensors")
    merged = shift_settings([name], settings, shift)
    part = make_defense(name, merged)
    assert isinstance(part, CmrmDataset)
    adopt(part, shift)
    chosen = next(row for row in search.rows if row.number == result["chosen"])
    assert part.settings == chosen.attributes["settings"]
    own = make_defense(name, settings)
    search.fitter.fit(own)
    assert own.fingerprint() == part.fingerprint(), "the same tensors as in the study"


def test_vectors_are_extracted_once_for_all_that_use_them(
    start: Start, engine: Remembering, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    estimate = TransformersEngine.estimate_shift

    def counted(self: Any, anchors: Any, **options: Any) -> Any:
        calls.append(options)
        return estimate(self, anchors, **options)

    monkeypatch.setattr(TransformersEngine, "estimate_shift", counted)
    start("cmrm_gated", trials=6).run()
    assert [call["mixed"] for call in calls] == [False, True], "each share of alarms by the curve"
    start("cmrm_gated", trials=7).run()
    assert len(calls) == 2, "they are on disk"


def test_a_fit_that_is_shared(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from cmrm.defenses.alphasteer import AlphaSteer

    fitted: list[Any] = []
    fit = AlphaSteer.fit

    def counted(self: AlphaSteer, *args: Any) -> None:
        fitted.append(self.fitted_by)
        fit(self, *args)

    monkeypatch.setattr(AlphaSteer, "fit", counted)
    start("alphasteer", trials=3).run()
    assert len(fitted) == len(set(fitted))


def test_without_questions_there_are_two_objectives(start: Start) -> None:
    tuner = start("coca", trials=2, sets=small_sets(questions=0))
    search = tuner.run()
    assert all(len(row.values) == 2 for row in search.rows if row.state == "finished")
    result = result_of(tuner, search)
    assert result["untouched"]["accuracy"] is None
    assert result["objectives"] == ["unsafe by small", "over_refusal by small"]
    assert result["artifact"] is None


def test_a_nearest_setting_leaves_no_artifact(start: Start, tmp_path: Path) -> None:
    tuner = start(trials=3, limits=Limits(1.0, 1.0))
    search = tuner.run()
    write_tuned(result_of(tuner, search), search, tmp_path)
    strict = replace(search, base=(1.0, -0.5, -0.5))
    tuner.options = replace(tuner.options, limits=Limits(0.0, 0.0))
    result = result_of(tuner, strict)
    write_tuned(result, strict, tmp_path)
    assert result["chosen"] is None
    assert result["nearest"] is not None
    assert not (tmp_path / "shift.safetensors").exists()
    assert not (tmp_path / "settings.json").exists()
